"""Configurations of the preprocessing. numpy only: this package is imported by data workers that never load torch."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from molmo_core.config import BaseConfig, ConfigError, Positive, Share, Size

LossTokenWeighting = Literal["root_subsegments", "root_subsegments_root_tokens"]
Patches = Annotated[int, Field(ge=1, le=1024)]
Margin = Annotated[int, Field(ge=0, le=1024)]


@dataclasses.dataclass
class DataFormatter(BaseConfig):
    """How a task record becomes messages (facts: published Molmo and Molmo2 recipes)."""

    prompt_templates: Literal["none", "uber_model", "uber_model_v2"] = "uber_model"
    """`none`: bare questions; `uber_model`: random templates for captions, pointing, counting and explanations."""
    message_format: Literal["none", "role", "qwen3"] = "role"
    """`role`: "User: .. Assistant:"; `qwen3`: the Qwen3 chat turns (Molmo2)."""
    system_prompt: (
        Literal[
            "none",
            "no_style",
            "style",
            "demo_or_style",
            "demo_or_style_v2",
            "style_and_length",
            "style_and_length_v2",
            "style_and_length_v3",
        ]
        | None
    ) = "demo_or_style"
    always_start_with_space: bool = False
    default_inference_len: Size | None = 65
    select_answer: Literal["best", "first"] = "best"
    image_last: bool = False
    """Put the image after the question (HeMolmo)."""
    pointing_format: Literal["v1", "html-v1", "html-v2", "tokens"] = "v1"
    """`v1`: percent with one decimal; `html-v1`/`html-v2`: Molmo2's 0-1000 integers; `tokens`: MolmoPoint's, which are no coordinates."""
    include_point_number: Literal["no_space_id_last", "space_id_last", "no_space"] = "no_space_id_last"
    """Where the number of a point is written (`tokens` only): `12`, ` 12` behind it or `12` before it."""
    p_multi_point_all_image: Share = 0.0
    p_choice_content_in_mc: Share = 1.0

    FIXED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "debug": (False,),
        "format_message_list": (None,),
        "p_one_message": (0,),
        "eval_system_prompt_mapping": (None,),
        "points_decimal_places": (1,),
        "seconds_decimal_places": (1,),
        "timestamp_mode": ("50-percent-seconds",),
        "output_timestamp_mode": ("seconds",),
        "use_seperate_non_pointing_qa_style": (False,),
        "use_seperate_count_without_pointing_style": (False,),
        "sample_random_initial_point": (True, False),  # of single-point tracking, which asks with a point
        "_point_start_token": (False,),
    }


@dataclasses.dataclass
class ImagePreprocessorConfig(BaseConfig):
    """What all preprocessors share: tiling, pooling, text limits."""

    crop_mode: Literal["resize", "overlap-and-resize-c2"] = "overlap-and-resize-c2"
    """`resize`: only the whole image, resized; `overlap-and-resize-c2`: plus overlapping high-resolution crops."""
    max_crops: Size = 12
    overlap_margins: tuple[Margin, Margin] = (4, 4)
    """Patches that a crop shares with its neighbours: left/top, right/bottom."""
    use_col_tokens: bool = True
    loss_token_weighting: LossTokenWeighting | None = None
    max_text_tokens: Size | None = None


@dataclasses.dataclass
class MolmoPreprocessorConfig(ImagePreprocessorConfig):
    """Images of Molmo; with Molmo2's layout switches."""

    max_images: Size | None = None
    max_multi_image_crops: Size | None = None
    """Crops per image when there are several (None = max_crops)."""
    high_res_max_crops: Size | None = None
    p_high_res: Share = 0.0
    """Probability, in training, of `high_res_max_crops` instead of `max_crops`."""
    pooling_w: Patches = 2
    pooling_h: Patches = 2
    legacy_image_mask: bool = False
    """Reproduce the mask order of the 0924 checkpoints (each crop carries its neighbour's mask)."""
    use_single_crop_col_tokens: bool = True
    use_single_crop_start_token: bool = False

    FIXED: ClassVar[dict[str, tuple[Any, ...]]] = {"normalize_on_gpu": (True, False)}


FrameSampling = Literal["uniform", "random", "adaptive", "fps", "fps_uniform", "uniform_last_frame"]


@dataclasses.dataclass
class VideoPreprocessorConfig(MolmoPreprocessorConfig):
    """Video frames of VideoOlmo."""

    crop_mode: Literal["resize", "overlap-and-resize-c2"] = "resize"
    time_mode: Literal["per-frame", "sampled-fps-prefix", "time-delta-prefix", "fps-prefix", "skip_time"] = "per-frame"
    max_frames: Size = 16
    frame_sample_mode: FrameSampling = "uniform"
    max_fps: Positive = 2.0
    """Rate limit of `uniform_last_frame`."""
    candidate_sampling_fps: list[Positive] = dataclasses.field(default_factory=lambda: [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0])
    periodic_high_res_frame: Size | None = None
    """Every N-th frame is pooled by `high_res_pooling_*` instead; None = all frames alike."""
    high_res_pooling_w: Patches | None = None
    high_res_pooling_h: Patches | None = None

    FIXED: ClassVar[dict[str, tuple[Any, ...]]] = {"query_based_resolution_selection": (False,), "normalize_on_gpu": (True, False)}


@dataclasses.dataclass
class HePreprocessorConfig(ImagePreprocessorConfig):
    """Low- and high-resolution views of HeMolmo."""

    max_crops: Size = 6
    num_high_res_features: Size | None = None
    """K: high-resolution tokens kept; None = ceil(selection_ratio * candidates)."""
    image_pooling_w: Patches = 2
    image_pooling_h: Patches = 2
    low_res_from_high: Patches | None = None
    """The low-resolution view pools this many patches (squared) of the high-resolution crops ..."""
    low_res_from_low: Patches | None = 2
    """... or, by default, of the global crop."""

    FIXED: ClassVar[dict[str, tuple[Any, ...]]] = {"indicate_k": (None,), "normalize_on_gpu": (True, False)}

    @classmethod
    def normalise(cls, data: dict[str, Any]) -> dict[str, Any]:
        if "max_text_len" in data:  # the published spelling
            data["max_text_tokens"] = data.pop("max_text_len")
        return data


@dataclasses.dataclass
class Molmo2PreprocessorConfig(MolmoPreprocessorConfig):
    """Images, several images and video of Molmo2 in one sequence layout."""

    max_crops: Size = 8
    use_single_crop_col_tokens: bool = False
    use_single_crop_start_token: bool = True
    video_pooling_w: Patches = 3
    video_pooling_h: Patches = 3
    max_frames: Size = 128
    frame_sample_mode: FrameSampling = "uniform_last_frame"
    max_fps: Positive = 2.0
    per_frame_special_token: bool = True
    max_subtitle_tokens: Size | None = None


# Settings of the published `mm_preprocessor.video` -> their names here (None: checked only).
_VIDEO_NAMES = {
    "max_frames": "max_frames", "frame_sample_mode": "frame_sample_mode", "max_fps": "max_fps", "pooling_w": "video_pooling_w",
    "pooling_h": "video_pooling_h", "per_frame_special_token": "per_frame_special_token", "max_subtitle_tokens": "max_subtitle_tokens",
}  # fmt: skip
_VIDEO_FIXED: dict[str, tuple[Any, ...]] = {
    "time_sampling": (True,), "time_mode": ("per-frame-compact",), "subtitle_mode": ("frame_1",), "use_frame_special_tokens": (True,),
}  # fmt: skip
_VIDEO_IGNORED = ("candidate_sampling_fps", "cache_videos", "loading_method")


@dataclasses.dataclass
class MolmoPointPreprocessorConfig(Molmo2PreprocessorConfig):
    """Molmo2's, with tokens of their own for the global crop. The published nested form (`image`, `video`) is read, too."""

    remove_repeats: Literal["all", "subpatch"] | None = None
    """Points of a record that are chosen alike are one (`all`), or those on one patch are (`subpatch`); None: all stay."""

    low_tokens_global_crop: ClassVar[bool] = True
    FIXED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "normalize_on_gpu": (True, False),
        "max_answer_len": (None,),
        "last_message_loss_only": (False,),
    }

    @classmethod
    def normalise(cls, data: dict[str, Any]) -> dict[str, Any]:
        video, image = data.pop("video", None), data.pop("image", None)
        if isinstance(image, dict):
            for axis in "wh":
                if image.get(f"multi_image_pooling_{axis}", image.get(f"pooling_{axis}")) != image.get(f"pooling_{axis}"):
                    raise ConfigError(f"mm_preprocessor.image.multi_image_pooling_{axis}: several images are pooled like one here")
            data = {k: v for k, v in image.items() if not k.startswith("multi_image_pooling_")} | data
        for name, value in (video or {}).items():
            if name in _VIDEO_NAMES:
                value = value[0] if name == "max_fps" and isinstance(value, list) else value
                data.setdefault(_VIDEO_NAMES[name], value)
            elif value not in _VIDEO_FIXED.get(name, (value,)) or name not in {*_VIDEO_FIXED, *_VIDEO_IGNORED}:
                raise ConfigError(f"mm_preprocessor.video.{name}={value!r} is not implemented")
        return data
