"""VideoOlmo's configuration."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from molmo_core.config import ConfigError
from molmo_core.model_configs.molmo import MolmoConfig
from molmo_core.preprocessing.configs import FrameSampling, VideoPreprocessorConfig

if TYPE_CHECKING:
    from molmo_core.preprocessing.preprocessor import MolmoPreprocessor


# Name of a setting of the model -> its published name in `mm_preprocessor`, which holds it.
_FRAMES = {"max_frames": "max_frames", "frame_sampling": "frame_sample_mode"}


@dataclasses.dataclass(init=False)
class VideoOlmoConfig(MolmoConfig):
    """Configuration of VideoOlmo.

    `max_frames` and `frame_sampling` may be given at the top, or under their published names in `mm_preprocessor`, which holds them.
    """

    model_name: Literal["video_olmo"] = "video_olmo"  # type: ignore[assignment]
    mm_preprocessor: VideoPreprocessorConfig = dataclasses.field(default_factory=VideoPreprocessorConfig)
    shared_low_high_embedding: bool = True
    """Low-resolution tokens share the embedding of the high-resolution ones."""

    FIXED: ClassVar[dict[str, tuple[Any, ...]]] = {"point_cloud_backbone": (None,), "image_as_video": (None,)}

    def __init__(self, max_frames: int | None = None, frame_sampling: FrameSampling | None = None, **settings: Any) -> None:
        """As `new`. `max_frames` and `frame_sampling` are those of `mm_preprocessor` unless given (its defaults: 16, uniform)."""
        frames = {"max_frames": max_frames, "frame_sampling": frame_sampling}
        vars(self).update(vars(self.new(**settings, **{name: value for name, value in frames.items() if value is not None})))

    @property
    def max_frames(self) -> int:
        """Most frames of a video."""
        return self.mm_preprocessor.max_frames

    @property
    def frame_sampling(self) -> FrameSampling:
        """Which frames: see `molmo_core.preprocessing.frame_sampling`."""
        return self.mm_preprocessor.frame_sample_mode

    @classmethod
    def normalise(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Moves the settings of the top into `mm_preprocessor`; two values in plain data are a contradiction."""
        mode = data.get("frame_sampling", "uniform")
        if mode not in get_args(FrameSampling):
            raise ConfigError(f"frame_sampling={mode!r}: one of {', '.join(get_args(FrameSampling))}")
        given = data.get("mm_preprocessor")
        built = isinstance(given, VideoPreprocessorConfig)
        inner = given.as_dict() if isinstance(given, VideoPreprocessorConfig) else given or {}
        top = {published: data.pop(name) for name, published in _FRAMES.items() if name in data}
        for name, published in _FRAMES.items():
            if not built and published in top and inner.get(published, top[published]) != top[published]:
                raise ConfigError(
                    f"{name}={top[published]!r} and mm_preprocessor.{published}={inner[published]!r} contradict each other; set {name} only"
                )
        return data | {"mm_preprocessor": {**inner, **top}} if top else data

    def as_dict(self) -> dict[str, Any]:
        """Plain data; the frame settings stand at the top only, so that an override changes one place."""
        data = super().as_dict()
        return data | {name: data["mm_preprocessor"].pop(published) for name, published in _FRAMES.items()}

    def preprocessor_kind(self) -> tuple[type[MolmoPreprocessor], dict[str, Any]]:
        from molmo_core.preprocessing.video_preprocessor import VideoOlmoPreprocessor

        return VideoOlmoPreprocessor, {}

    def high_res_pooling(self) -> tuple[int, int]:
        """Patches of a high-resolution token: rows, columns."""
        config = self.mm_preprocessor
        return config.high_res_pooling_h or config.pooling_h, config.high_res_pooling_w or config.pooling_w
