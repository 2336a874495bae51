"""What is served, where, and within which limits."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import ClassVar, Literal

from molmo_core.config import BaseConfig, ConfigError


@dataclasses.dataclass
class ServeConfig(BaseConfig):
    """`python -m jobs.serve`: one model behind an OpenAI-style API."""

    model: str = ""
    """`models:/name@alias`, `models:/name/version` or a checkpoint folder."""
    name: str | None = None
    """What clients call the model; None = its name in the registry, or the folder's name."""
    host: str = "127.0.0.1"
    """Address to listen on. The API has no log-in: on other addresses than this machine's own, put a gateway before it."""
    port: int = 8000

    replicas: int = 1
    """Copies of the model."""
    frontends: int = 1
    """Processes that read requests, decode images and tokenise."""
    cpus_per_replica: float = 1.0
    gpus_per_replica: float = 0.0
    """1: the model runs on a GPU; 0: on the CPU."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    max_batch_size: int = 16
    """Answers that a replica generates at the same time."""
    batch_wait_ms: float = 5.0
    """How long an idle replica waits for more requests before it starts on the first."""
    max_queued_requests: int = 256
    """Requests that wait in a replica beyond those in work; the next one is refused with 429."""
    max_new_tokens: int = 200
    """Length of an answer when the request sets none."""
    max_body_bytes: int = 32 << 20
    max_text_bytes: int = 256 << 10
    """Text of all messages of a request. What cannot fit the model's context is refused in any case, before it is tokenised."""
    max_image_pixels: int = 50_000_000
    max_images: int = 8
    """Images in one request."""
    timeout_s: float = 600.0
    """Longest time from a request to the end of its answer, streamed or not."""

    PATHS: ClassVar[tuple[str, ...]] = ("model",)
    # Least and most of every number.
    LIMITS: ClassVar[dict[str, tuple[float, float]]] = {
        "port": (1, 65535),
        "replicas": (1, 1024),
        "frontends": (1, 1024),
        "cpus_per_replica": (0, 1024),
        "gpus_per_replica": (0, 64),
        "max_batch_size": (1, 4096),
        "batch_wait_ms": (0, 10_000),
        "max_queued_requests": (1, 100_000),
        "max_new_tokens": (1, 10_000_000),
        "max_body_bytes": (1024, 1 << 30),
        "max_text_bytes": (1, 1 << 30),
        "max_image_pixels": (1, 1 << 31),
        "max_images": (1, 1000),
        "timeout_s": (0.1, 7 * 24 * 3600),
    }

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("serve: model must be given (for example model=models:/molmo-demo@champion)")
        for name, (least, most) in self.LIMITS.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise ConfigError(f"serve: {name}={value} must be from {least:,} to {most:,}")

    @property
    def served_name(self) -> str:
        """The name that requests use."""
        registered = re.fullmatch(r"models:/([^/@]+).*", self.model)
        return self.name or (registered[1] if registered else Path(self.model).resolve().name)

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
