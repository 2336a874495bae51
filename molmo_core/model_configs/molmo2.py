"""Molmo2's configuration."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from molmo_core.model_configs.molmo import MolmoConfig
from molmo_core.nn.configs import BidirectionalAttention
from molmo_core.preprocessing.configs import DataFormatter, Molmo2PreprocessorConfig
from molmo_core.tokens import TokenLayout

if TYPE_CHECKING:
    from molmo_core.preprocessing.preprocessor import MolmoPreprocessor


def _formatter() -> DataFormatter:
    return DataFormatter(
        prompt_templates="uber_model_v2", message_format="qwen3", system_prompt="demo_or_style_v2", pointing_format="html-v2"
    )


@dataclasses.dataclass
class Molmo2Config(MolmoConfig):
    """Configuration of Molmo2. The defaults are those of the published models where these agree."""

    model_name: Literal["molmo2"] = "molmo2"  # type: ignore[assignment]
    data_formatter: DataFormatter = dataclasses.field(default_factory=_formatter)
    mm_preprocessor: Molmo2PreprocessorConfig = dataclasses.field(default_factory=Molmo2PreprocessorConfig)
    bi_directional_attn: BidirectionalAttention | None = "image_tokens"

    LAYOUT: ClassVar[TokenLayout] = "molmo2"

    def preprocessor_kind(self) -> tuple[type[MolmoPreprocessor], dict[str, Any]]:
        from molmo_core.preprocessing.molmo2_preprocessor import Molmo2Preprocessor

        return Molmo2Preprocessor, {}
