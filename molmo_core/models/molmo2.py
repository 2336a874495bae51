"""Molmo2: text, an image, several images or a video in, text out, in one model.

Its network is Molmo's: what differs are the layout of the tokens, attention among image tokens in both directions, per-frame tokens,
and settings of the language model (q/k norms, YaRN on some layers), all of them configuration.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from molmo_core.models.molmo import Molmo, MolmoConfig
from molmo_core.nn.image_tokens import BidirectionalAttention, ImageTokenIds
from molmo_core.preprocessing.configs import DataFormatter, Molmo2PreprocessorConfig

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

    MODEL: ClassVar[str] = "Molmo2"
    LAYOUT: ClassVar[Literal["molmo", "molmo2"]] = "molmo2"

    @property
    def image_tokens(self) -> ImageTokenIds:
        return ImageTokenIds.molmo2(self.llm.embedding_rows)

    def preprocessor_kind(self) -> tuple[type[MolmoPreprocessor], dict[str, Any]]:
        from molmo_core.preprocessing.molmo2_preprocessor import Molmo2Preprocessor

        return Molmo2Preprocessor, {}


class Molmo2(Molmo):
    """Molmo with Molmo2's token layout; images and frames alike are `images` with `pooled_patches_idx` (k = 4 or 9)."""

    config: Molmo2Config
