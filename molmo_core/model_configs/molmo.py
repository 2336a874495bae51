"""Molmo's configuration, and what it builds: tokenizer, preprocessor, collator, model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from molmo_core.config import ConfigError
from molmo_core.nn.configs import BidirectionalAttention, LlmConfig, MolmoVisionBackboneConfig
from molmo_core.preprocessing.configs import DataFormatter, MolmoPreprocessorConfig
from molmo_core.preprocessing.tiling import ImageSettings
from molmo_core.registry import BaseModelConfig
from molmo_core.tokens import ImageTokenIds, TokenLayout

if TYPE_CHECKING:
    from molmo_core.preprocessing.collator import MMCollator
    from molmo_core.preprocessing.point_reader import PointTextReader
    from molmo_core.preprocessing.preprocessor import MolmoPreprocessor
    from molmo_core.preprocessing.tokenizer import Tokenizer


@dataclasses.dataclass
class MolmoConfig(BaseModelConfig):
    """Configuration of Molmo (names as in the published configuration files)."""

    model_name: Literal["molmo"] = "molmo"
    llm: LlmConfig = dataclasses.field(default_factory=LlmConfig)
    vision_backbone: MolmoVisionBackboneConfig | None = dataclasses.field(default_factory=MolmoVisionBackboneConfig)
    """None: a text-only model."""
    data_formatter: DataFormatter = dataclasses.field(default_factory=DataFormatter)
    mm_preprocessor: MolmoPreprocessorConfig = dataclasses.field(default_factory=MolmoPreprocessorConfig)
    bi_directional_attn: BidirectionalAttention | None = None
    """Attention among image tokens; None = causal."""

    FIXED: ClassVar[dict[str, tuple[Any, ...]]] = {"point_cloud_backbone": (None,)}
    LAYOUT: ClassVar[TokenLayout] = "molmo"

    @property
    def image_tokens(self) -> ImageTokenIds:
        """Ids of the image tokens."""
        return ImageTokenIds.of(self.LAYOUT, self.llm.embedding_rows)

    def image_settings(self) -> ImageSettings:
        """Sizes that relate pixels, crops, patches and tokens."""
        if self.vision_backbone is None:
            raise ConfigError("vision_backbone is null: this is a text-only model")
        return ImageSettings.from_configs(self.vision_backbone.vit, self.mm_preprocessor)

    def build_tokenizer(self) -> Tokenizer:
        """The text tokenizer with the special tokens of this model."""
        from molmo_core.preprocessing.tokenizer import Tokenizer

        source = self.llm.tokenizer
        first = self.llm.embedding_rows
        return Tokenizer.load(source.identifier, first_special_id=first, layout=self.LAYOUT, cache_dir=source.tokenizer_dir)

    def build_preprocessor(
        self, for_inference: bool, is_training: bool = True, include_image: bool = False, max_seq_len: int | None = None
    ) -> MolmoPreprocessor:
        """What turns an example into the inputs of the model.

        Args:
            for_inference: the prompt only, no answer and no labels.
            is_training: vary prompts and resolution (never at inference).
            include_image: keep the decoded image in the metadata.
            max_seq_len: longest sequence (default `llm.max_sequence_length`).
        """
        from molmo_core.preprocessing.preprocessor import build_preprocessor

        kind, settings = self.preprocessor_kind()
        return build_preprocessor(
            self.build_tokenizer(),
            None if self.vision_backbone is None else self.vision_backbone.vit,
            self.data_formatter,
            self.mm_preprocessor,
            for_inference=for_inference,
            is_training=is_training,
            include_image=include_image,
            max_seq_len=max_seq_len or self.llm.max_sequence_length,
            kind=kind,
            **settings,
        )

    def preprocessor_kind(self) -> tuple[type[MolmoPreprocessor], dict[str, Any]]:
        """The class of the preprocessor, and its settings beside the shared ones."""
        from molmo_core.preprocessing.preprocessor import MolmoPreprocessor

        return MolmoPreprocessor, {}

    def answer_reader(self, tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> PointTextReader | None:
        """What makes text of the tokens of an answer that stand for points; None: an answer is text.

        Args:
            tokenizer: of this model.
            metadata: what the preprocessor says of the prompt.
        """
        return None

    def build_collator(
        self, sequence_length: int | None, pad_mode: Literal["to_max"] | None = None, include_metadata: bool = True
    ) -> MMCollator:
        """What joins preprocessed examples to a batch; `pad_mode="to_max"` pads to `sequence_length`, None to the longest."""
        from molmo_core.preprocessing.collator import MMCollator

        return MMCollator(sequence_length, pad_mode, include_metadata)
