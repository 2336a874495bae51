"""MolmoPoint's configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from molmo_core.config import ConfigError
from molmo_core.model_configs.molmo import MolmoConfig
from molmo_core.nn.configs import BidirectionalAttention, LlmConfig, MolmoVisionBackboneConfig
from molmo_core.nn.point_configs import PointConfig
from molmo_core.preprocessing.configs import DataFormatter, MolmoPointPreprocessorConfig
from molmo_core.preprocessing.point_tokens import PointStyle
from molmo_core.tokens import PointTokenIds, TokenLayout

if TYPE_CHECKING:
    from molmo_core.preprocessing.point_places import PointPlaces
    from molmo_core.preprocessing.point_reader import PointTextReader
    from molmo_core.preprocessing.preprocessor import MolmoPreprocessor
    from molmo_core.preprocessing.tokenizer import Tokenizer


def _llm() -> LlmConfig:
    return LlmConfig(can_predict_extra_tokens=True)


def _backbone() -> MolmoVisionBackboneConfig:
    return MolmoVisionBackboneConfig.new(image_model_type="siglip2", pooling_attention_mask=True, pooling_out_layer=False)


def _formatter() -> DataFormatter:
    return DataFormatter(
        prompt_templates="uber_model_v2", message_format="qwen3", system_prompt="demo_or_style_v2", pointing_format="tokens"
    )


@dataclasses.dataclass
class MolmoPointConfig(PointConfig, MolmoConfig):
    """Configuration of MolmoPoint. The published files' `vit` and `connector` at the top are read, too; they are `vision_backbone` here."""

    model_name: Literal["molmo_point"] = "molmo_point"  # type: ignore[assignment]
    llm: LlmConfig = dataclasses.field(default_factory=_llm)
    vision_backbone: MolmoVisionBackboneConfig = dataclasses.field(default_factory=_backbone)  # type: ignore[assignment]
    data_formatter: DataFormatter = dataclasses.field(default_factory=_formatter)
    mm_preprocessor: MolmoPointPreprocessorConfig = dataclasses.field(default_factory=MolmoPointPreprocessorConfig)
    bi_directional_attn: BidirectionalAttention | None = "image_tokens"

    FIXED: ClassVar[dict[str, tuple[Any, ...]]] = {
        **PointConfig.FIXED,
        **dict.fromkeys(("cross_attend_layers", "cross_attend_dim", "image_token_copy", "cp_enabled", "point_start_token"), (None, False)),
        "apply_cp_to_vision_backbone": (None, False),
        "layers_to_add_image_features_to": (None, [0]),
    }
    LAYOUT: ClassVar[TokenLayout] = "molmo2"

    @classmethod
    def normalise(cls, data: dict[str, Any]) -> dict[str, Any]:
        vit, connector = data.pop("vit", None), data.pop("connector", None)
        if vit is not None or connector is not None:
            if data.get("vision_backbone") is not None:
                raise ConfigError("vision_backbone and vit or connector: the encoder is described twice")
            connector = dict(connector or {})
            if connector.get("positional_embeddings") is True:  # spelling of the first files
                connector["positional_embeddings"] = 16 if "share_pooler" in connector else 9
            connector["positional_embeddings"] = connector.get("positional_embeddings") or None
            connector.pop("share_pooler", None)
            data["vision_backbone"] = {"pooling_attention_mask": True, **connector} | ({} if vit is None else {"vit": vit})
        formatter, class_, cells = data.get("data_formatter"), data.get("no_more_points_class"), data.get("patch_location", "3x3")
        if isinstance(formatter, dict):  # the published files repeat these settings there
            for name, value in (("_end_with_patch", class_), ("_location_token", cells is not None)):
                given = formatter.get(name)
                if value is not None and given is not None and bool(given) != bool(value):
                    raise ConfigError(f"data_formatter.{name}={given!r} contradicts the settings of the model")
            data["data_formatter"] = {k: v for k, v in formatter.items() if k not in ("_end_with_patch", "_location_token")}
            data["data_formatter"].setdefault("pointing_format", "tokens")
        if not isinstance(data.get("llm"), LlmConfig):
            data["llm"] = {"can_predict_extra_tokens": True, **(data.get("llm") or {})}
        return data

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.llm.can_predict_extra_tokens:
            raise ConfigError("llm.can_predict_extra_tokens must be true: points are special tokens")
        if self.data_formatter.pointing_format != "tokens":
            raise ConfigError("data_formatter.pointing_format must be tokens: MolmoPoint chooses points and writes no coordinates")
        vision = self.vision_backbone
        if vision is None or vision.image_pooling_2d != "attention_meanq" or not vision.pooling_attention_mask:
            raise ConfigError("MolmoPoint pools with image_pooling_2d=attention_meanq and pooling_attention_mask=true")
        if not self.sort_points and self.mask_patches == "always":
            raise ConfigError("mask_patches=always forbids points out of order: with sort_points=false set it to never")

    def answer_reader(self, tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> PointTextReader:
        from molmo_core.preprocessing.point_reader import PointTextReader

        return PointTextReader(tokenizer, self.point_places(metadata))

    def point_places(self, metadata: Mapping[str, Any]) -> PointPlaces | None:
        """What can be pointed at in a prompt, by the sizes of its images or the times of its frames; None: nothing.

        Args:
            metadata: what the preprocessor says of it (at inference): `image_sizes` [(width, height)] or `frame_times`, seconds.
        """
        from molmo_core.preprocessing.point_places import PointPlaces

        times, sizes, config = metadata.get("frame_times"), metadata.get("image_sizes"), self.mm_preprocessor
        cells = self.patch_location is not None
        if times:
            pooling = (config.video_pooling_h, config.video_pooling_w)
            return dataclasses.replace(PointPlaces.of_frames(times, self.image_settings(), pooling), cells=cells)
        if not sizes or config.crop_mode == "resize":
            return None
        several = config.max_multi_image_crops if len(sizes) > 1 else None
        settings = dataclasses.replace(self.image_settings(), max_crops=several or config.max_crops)
        return dataclasses.replace(PointPlaces.of_images(sizes, settings), cells=cells)

    @property
    def point_tokens(self) -> PointTokenIds:
        """Ids of the tokens of points."""
        return PointTokenIds.of(self.LAYOUT, self.llm.embedding_rows)

    @property
    def most_patches(self) -> int:
        """The most patches that a pooled token has."""
        config = self.mm_preprocessor
        return max(config.pooling_h * config.pooling_w, config.video_pooling_h * config.video_pooling_w)

    def preprocessor_kind(self) -> tuple[type[MolmoPreprocessor], dict[str, Any]]:
        from molmo_core.preprocessing.molmo_point_preprocessor import MolmoPointPreprocessor

        return MolmoPointPreprocessor, {"point_style": self.point_style}

    @property
    def point_style(self) -> PointStyle:
        """How points are written."""
        return PointStyle(
            cells=self.patch_location is not None,
            ends=self.no_more_points_class,
            in_order=self.sort_points,
            remove_repeats=self.mm_preprocessor.remove_repeats,
            numbering=self.data_formatter.include_point_number,
        )
