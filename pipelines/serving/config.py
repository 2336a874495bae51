"""What is served, where, and within which limits."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from molmo_core.config import BaseConfig, ConfigError
from pipelines.serving.media.addresses import host_and_port

FRONTEND_CPUS = 0.1
"""Of a frontend, in Ray's count: it waits most of the time."""


@dataclasses.dataclass
class Example(BaseConfig):
    """What the page offers to click."""

    question: str
    """Of an example to click on the page at `/` (a list of them; none = a few about a drawing)."""
    file: str | None = None
    """Its picture (.png, .jpg, .webp, .svg) or video (.mp4, .webm)."""

    PATHS: ClassVar[tuple[str, ...]] = ("file",)


@dataclasses.dataclass
class ServedModel(BaseConfig):
    """A model and its replicas."""

    model: str = ""
    """`models:/name@alias`, `models:/name/version` or a checkpoint folder."""
    name: str | None = None
    """What clients call the model; None = its name in the registry, or the folder's name."""
    follow_alias: bool = False
    """When the alias moves, replicas of the version that it names then take over, without a failed request. There must be room for the
    new ones beside the old ones."""
    system_messages: bool = False
    """The model was trained on records with system messages: their words join the first question, as there. Else they are refused."""

    replicas: Annotated[int, Field(ge=1, le=1024)] = 1
    """Copies of the model."""
    max_replicas: Annotated[int, Field(ge=1, le=1024)] | None = None
    """With more requests than `replicas` have places in their batches, up to so many are started; None = no more than `replicas`."""
    cpus_per_replica: Annotated[float, Field(ge=0, le=1024)] = 1.0
    gpus_per_replica: Annotated[float, Field(ge=0, le=64)] = 0.0
    """1: the model runs on a GPU; 0: on the CPU."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantization: Literal["none", "float8"] = "none"
    """float8: weights of the language model's blocks are rounded to float8 (e4m3, a scale for each row) when a replica starts, which must
    have room for them in `dtype` at first. A GPU must be one of Ada, Hopper or later; mixtures of experts are refused."""

    max_batch_size: Annotated[int, Field(ge=1, le=4096)] = 16
    """Answers that a replica generates at the same time."""
    speculate: Annotated[int, Field(ge=0, le=16)] = 0
    """Tokens that are proposed for an answer in a step, if its most probable tokens are taken as they are: those that followed its newest
    tokens earlier in prompt or answer. For answers that repeat (lists of points, transcriptions); 0 = none. Not for MolmoPoint."""
    batch_wait_ms: Annotated[float, Field(ge=0, le=10_000)] = 5.0
    """How long an idle replica waits for more requests before it starts on the first."""
    max_queued_requests: Annotated[int, Field(ge=1, le=100_000)] = 256
    """Requests that wait in a replica beyond those in work; the next one is refused with 429."""
    max_new_tokens: Annotated[int, Field(ge=1, le=10_000_000)] = 200
    """Length of an answer when the request sets none."""

    PATHS: ClassVar[tuple[str, ...]] = ("model",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.follow_alias and "@" not in self.model:
            raise ConfigError(f"serve: follow_alias: {self.model!r} has no alias (models:/name@alias)")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ConfigError(f"serve: max_replicas={self.max_replicas} is less than replicas={self.replicas}")
        if self.quantization == "float8" and self.gpus_per_replica and self.dtype == "float32":
            raise ConfigError("serve: quantization=float8: on a GPU dtype must be bfloat16 or float16")

    @property
    def served_name(self) -> str:
        """The name that requests use."""
        registered = re.fullmatch(r"models:/([^/@]+).*", self.model)
        return self.name or (registered[1] if registered else Path(self.model).resolve().name)

    @property
    def most_replicas(self) -> int:
        """How many there may be."""
        return self.max_replicas or self.replicas


@dataclasses.dataclass
class ServeConfig(ServedModel):
    """`python -m jobs.serve`: a model, or several, behind an OpenAI-style API."""

    models: list[ServedModel] = dataclasses.field(default_factory=list)
    """Several models, in place of `model` and the settings of its replicas, each with its own."""
    host: str = "127.0.0.1"
    """Address to listen on. On others than this machine's own there must be API keys."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    api_keys_file: str | None = None
    """File with the keys that clients must send, one a line, readable by its owner only; None = those of the environment variable
    MOLMO_API_KEYS, if it is set."""
    frontends: Annotated[int, Field(ge=1, le=1024)] = 1
    """Processes that read requests, decode images and tokenise."""

    max_body_bytes: Annotated[int, Field(ge=1024, le=1 << 30)] = 32 << 20
    max_text_bytes: Annotated[int, Field(ge=1, le=1 << 30)] = 256 << 10
    """Text of all messages of a request. What cannot fit the model's context is refused in any case, before it is tokenised."""

    media_workers: Annotated[int, Field(ge=1, le=1024)] = 2
    """Processes of a frontend that decode and preprocess media; not counted in Ray's CPUs, since they give way to everything else."""
    max_queued_media: Annotated[int, Field(ge=1, le=100_000)] = 128
    """Media that wait in a frontend or are in work; the next one is refused with 429."""
    media_timeout_s: Annotated[float, Field(ge=0.1, le=3600)] = 30.0
    """Longest time for decoding one medium."""
    media_cache_bytes: Annotated[int, Field(ge=0, le=1 << 40)] = 256 << 20
    """Of prepared media that a frontend keeps for the next request with the same ones; 0 = none."""
    allowed_media_hosts: list[str] = dataclasses.field(default_factory=list)
    """Hosts from which media are fetched by https: `name`, or `name:port`; none = nothing is fetched, clients send the media themselves."""
    fetch_timeout_s: Annotated[float, Field(ge=0.1, le=3600)] = 10.0
    """Longest time for fetching one medium."""
    max_media_bytes: Annotated[int, Field(ge=1024, le=1 << 30)] = 32 << 20
    """Of one image or video, as a file."""
    max_image_pixels: Annotated[int, Field(ge=1, le=1 << 31)] = 50_000_000
    """Of an image, or of a frame of a video."""
    max_images: Annotated[int, Field(ge=1, le=1000)] = 8
    """Images in one request."""
    max_video_seconds: Annotated[float, Field(ge=0.1, le=7 * 24 * 3600)] = 3600.0
    max_video_frames: Annotated[int, Field(ge=1, le=1 << 31)] = 250_000
    """In the file; the model's own sampling decides how many of them are decoded."""

    timeout_s: Annotated[float, Field(ge=0.1, le=7 * 24 * 3600)] = 600.0
    """Longest time from a prepared request to the end of its answer, streamed or not."""
    drain_s: Annotated[float, Field(ge=0, le=7 * 24 * 3600)] = 60.0
    """How long a process that is stopped or replaced may go on with its answers."""

    examples: list[Example] = dataclasses.field(default_factory=list)
    """Examples to click on the page at `/`; none = a few about a drawing."""
    multi_turn: bool = True
    """Whether the page sends earlier turns along (its users can change that); false for a model that was trained on single questions."""

    trace_endpoint: str | None = None
    """Where traces of requests are sent by OTLP over HTTP, e.g. http://collector:4318/v1/traces; null = no traces. Headers that the
    receiver asks for are in the environment variable OTEL_EXPORTER_OTLP_HEADERS."""
    trace_sample: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of the requests that are traced."""
    trace_content: bool = False
    """Texts and pictures are in the traces, too."""

    PATHS: ClassVar[tuple[str, ...]] = ("model", "api_keys_file")

    def __post_init__(self) -> None:
        super().__post_init__()
        for host in self.allowed_media_hosts:
            host_and_port(host)
        if bool(self.model) == bool(self.models):
            raise ConfigError("serve: either model or models must be given (for example model=models:/molmo-demo@champion)")
        if not all(one.model for one in self.models):
            raise ConfigError("serve: models: each of them has a `model`")
        names = [one.served_name for one in self.each]
        if len(set(names)) < len(names):
            raise ConfigError(f"serve: models: two of them have the same name ({', '.join(names)}); set `name`")

    @property
    def each(self) -> list[ServeConfig]:
        """The configuration for each of the models, as if it were the only one."""
        return [dataclasses.replace(self, models=[], **vars(one)) for one in self.models] or [self]

    @property
    def cpus(self) -> float:
        """Of all processes, in Ray's count; new replicas may have to start beside the old ones."""
        models = sum(one.most_replicas * one.cpus_per_replica * (2 if one.follow_alias else 1) for one in self.each)
        return models + self.frontends * FRONTEND_CPUS * 2

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
