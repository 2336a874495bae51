"""HeMolmo's configuration."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from molmo_core.config import ConfigError
from molmo_core.model_configs.molmo import MolmoConfig
from molmo_core.nn.configs import BidirectionalAttention
from molmo_core.nn.selection_configs import TokenScorerConfig, TokenSelectionConfig
from molmo_core.preprocessing.configs import DataFormatter, HePreprocessorConfig

if TYPE_CHECKING:
    from molmo_core.preprocessing.preprocessor import MolmoPreprocessor


@dataclasses.dataclass
class HeMolmoConfig(MolmoConfig):
    """Configuration of HeMolmo."""

    model_name: Literal["he_molmo"] = "he_molmo"  # type: ignore[assignment]
    data_formatter: DataFormatter = dataclasses.field(default_factory=lambda: DataFormatter(image_last=True))
    mm_preprocessor: HePreprocessorConfig = dataclasses.field(default_factory=HePreprocessorConfig)  # type: ignore[assignment]
    token_scorer: TokenScorerConfig = dataclasses.field(default_factory=TokenScorerConfig)
    token_selector: TokenSelectionConfig = dataclasses.field(default_factory=TokenSelectionConfig)
    selection_ratio: Annotated[float, Field(gt=0, le=1)] = 0.25
    """K = ceil(selection_ratio * candidates) high-resolution tokens are kept, unless `mm_preprocessor.num_high_res_features` names K."""
    shared_low_high_embedding: bool = True
    """Low-resolution tokens share the embedding of the high-resolution ones."""
    bi_directional_attn: BidirectionalAttention | None = "within_image"

    @classmethod
    def normalise(cls, data: dict[str, Any]) -> dict[str, Any]:
        if data.get("bi_directional_attn") == "within_resolution":  # one image: each view has one resolution
            data["bi_directional_attn"] = "within_image"
        return data

    def __post_init__(self) -> None:
        super().__post_init__()
        layers = self.token_scorer.n_low_res_layers
        if layers is not None and not 1 <= layers <= self.llm.n_layers:
            raise ConfigError(f"token_scorer.n_low_res_layers={layers}: the language model has {self.llm.n_layers} layers")

    @property
    def low_res_layers(self) -> int:
        """Blocks whose outputs the scorer reads."""
        return self.token_scorer.n_low_res_layers or self.llm.n_layers

    def preprocessor_kind(self) -> tuple[type[MolmoPreprocessor], dict[str, Any]]:
        from molmo_core.preprocessing.he_preprocessor import HeMolmoPreprocessor

        return HeMolmoPreprocessor, {
            "selection_ratio": self.selection_ratio,
            "interpolation_factor": self.token_scorer.low_to_high_interpolation_factor,
            "col_tokens": self.token_scorer.high_res_col_tokens,
        }
