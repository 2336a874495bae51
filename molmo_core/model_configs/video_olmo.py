"""VideoOlmo's configuration."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from molmo_core.config import ConfigError
from molmo_core.model_configs.molmo import MolmoConfig
from molmo_core.preprocessing.configs import FrameSampling, VideoPreprocessorConfig

if TYPE_CHECKING:
    from molmo_core.preprocessing.preprocessor import MolmoPreprocessor


@dataclasses.dataclass
class VideoOlmoConfig(MolmoConfig):
    """Configuration of VideoOlmo."""

    model_name: Literal["video_olmo"] = "video_olmo"  # type: ignore[assignment]
    mm_preprocessor: VideoPreprocessorConfig = dataclasses.field(default_factory=VideoPreprocessorConfig)
    shared_low_high_embedding: bool = True
    """Low-resolution tokens share the embedding of the high-resolution ones."""
    max_frames: int = 16
    """Most frames of a video."""
    frame_sampling: FrameSampling = "uniform"
    """Which frames: see `molmo_core.preprocessing.frame_sampling`."""

    FIXED: ClassVar[dict[str, tuple[Any, ...]]] = {"point_cloud_backbone": (None,), "image_as_video": (None,)}

    # Top-level name -> the published name inside mm_preprocessor.
    _FRAMES: ClassVar[dict[str, str]] = {"max_frames": "max_frames", "frame_sampling": "frame_sample_mode"}

    @classmethod
    def normalise(cls, data: dict[str, Any]) -> dict[str, Any]:
        """`max_frames` and `frame_sampling` may stand at the top, or under their published names in `mm_preprocessor`."""
        inner = data.get("mm_preprocessor")
        inner = dataclasses.asdict(inner) if isinstance(inner, VideoPreprocessorConfig) else dict(inner or {})
        for name, published in cls._FRAMES.items():
            both = name in data and published in inner and not isinstance(data.get("mm_preprocessor"), VideoPreprocessorConfig)
            if both and data[name] != inner[published]:
                raise ConfigError(
                    f"{name}={data[name]!r} and mm_preprocessor.{published}={inner[published]!r} contradict each other; set {name} only"
                )
            if name in data:
                inner[published] = data[name]
            elif published in inner:
                data[name] = inner[published]
        data["mm_preprocessor"] = inner
        return data

    def __post_init__(self) -> None:
        """Both places agree also after direct construction: what differs from the defaults wins, the top first."""
        defaults = {f.name: f.default for f in dataclasses.fields(self) if f.name in self._FRAMES}
        for name, published in self._FRAMES.items():
            if getattr(self, name) == defaults[name]:
                setattr(self, name, getattr(self.mm_preprocessor, published))
        settings = {published: getattr(self, name) for name, published in self._FRAMES.items()}
        self.mm_preprocessor = dataclasses.replace(self.mm_preprocessor, **settings)

    def as_dict(self) -> dict[str, Any]:
        """Plain data; the frame settings stand at the top only, so that an override changes one place."""
        data = super().as_dict()
        for published in self._FRAMES.values():
            del data["mm_preprocessor"][published]
        return data

    def preprocessor_kind(self) -> tuple[type[MolmoPreprocessor], dict[str, Any]]:
        from molmo_core.preprocessing.video_preprocessor import VideoOlmoPreprocessor

        return VideoOlmoPreprocessor, {}

    def high_res_pooling(self) -> tuple[int, int]:
        """Patches of a high-resolution token: rows, columns."""
        config = self.mm_preprocessor
        return config.high_res_pooling_h or config.pooling_h, config.high_res_pooling_w or config.pooling_w
