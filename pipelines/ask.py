"""One answer of a model, without a server and without Ray: a question and its pictures or video in, text as it is generated."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from molmo_core.checkpoint import load_model
from molmo_core.config import ConfigError, MissingFile
from molmo_core.generation.engine.engine import Engine, EngineLimits
from molmo_core.generation.engine.paged import PagedCache
from molmo_core.generation.engine.requests import End, Failed, Request, SamplingParams, Token
from molmo_core.preprocessing.media import MediaError, load_image
from molmo_core.preprocessing.points import Point, extract_points
from molmo_core.preprocessing.video_readers import open_video
from pipelines.data.records.content import medium
from pipelines.model_folder import fixed_model, model_folder
from pipelines.serving.text_stream import TextStream

Media = dict[str, Any]
PAGE = 64


def media_of(paths: Sequence[str]) -> Media:
    """The media of a question as an example has them: pictures (`image`, `images`) or one `video`.

    Raises:
        ConfigError: a file is missing or cannot be read, or a video is not the only medium.
    """
    for path in paths:
        if not Path(path).is_file():
            raise MissingFile(f"{path}: no such file", path)
    videos = [path for path in paths if medium(path) == "video"]
    if videos and len(paths) > 1:
        raise ConfigError(f"{', '.join(paths)}: give one video, or pictures")
    try:
        if videos:
            open_video(videos[0]).close()
            return {"video": videos[0]}
        images = [load_image(path) for path in paths]
    except MediaError as error:
        raise ConfigError(str(error)) from None
    return {} if not images else {"image": images[0]} if len(images) == 1 else {"images": images}


def sizes_of(media: Media) -> list[tuple[int, int]]:
    """(width, height) of each picture, or of the video, in pixels."""
    if "video" in media:
        reader = open_video(media["video"])
        try:
            frames = [reader.get_batch([0])[0]]
        finally:
            reader.close()
    else:
        frames = media["images"] if "images" in media else [media["image"]] if "image" in media else []
    return [(frame.shape[1], frame.shape[0]) for frame in frames]


def points_in(text: str, media: Media) -> list[tuple[Point, tuple[int, int]]]:
    """The points of an answer in pixels of the picture that each is on, and the (width, height) of that picture.

    `Point.block` is the number of the picture, from 1, or the time in a video.
    """
    shares = extract_points(text, 1, 1) if media else []
    if not shares:
        return []
    sizes = sizes_of(media)
    found = []
    for point in shares:
        picture = int(point.block or 1) - 1 if "video" not in media else 0
        if picture < len(sizes):
            width, height = sizes[picture]
            found.append((dataclasses.replace(point, x=point.x * width, y=point.y * height), (width, height)))
    return found


class Asker:
    """A loaded model.

    Args:
        model: a checkpoint folder, a repository of the hub, or an address of the registry.
        dtype: of the weights; None = bfloat16 on a GPU, else float32.

    Raises:
        ConfigError: there is no such model.
    """

    def __init__(self, model: str, dtype: torch.dtype | None = None) -> None:
        gpu = torch.cuda.is_available()
        chosen = dtype or (torch.bfloat16 if gpu else torch.float32)
        self.model: Any = load_model(model_folder(fixed_model(model)), chosen, "cuda" if gpu else "cpu").eval()
        self._dtype = chosen
        self._preprocess = self.model.config.build_preprocessor(for_inference=True, is_training=False)

    def ask(self, question: str, media: Media, max_tokens: int, temperature: float = 0.0, seed: int | None = None) -> Iterator[str]:
        """The answer, piece by piece.

        Args:
            max_tokens: longest answer; what the model's context has room for, if that is less.

        Raises:
            ConfigError: the model cannot read this (media that it does not take, a prompt longer than its context).
        """
        try:
            example = self._preprocess({**media, "messages": [{"role": "user", "content": question}], "placeholders": False})
        except ValueError as error:
            raise ConfigError(f"the model cannot read this: {error}") from None
        reader = self.model.config.answer_reader(self.model.tokenizer, example.pop("metadata", None) or {})
        llm, prompt = self.model.config.llm, len(example["input_ids"])
        room = llm.max_sequence_length - prompt
        if room < 1:
            raise ConfigError(f"the prompt has {prompt:,} tokens, media included; the model's context is {llm.max_sequence_length:,}")
        longest = min(max_tokens, room)
        pages = -(-(prompt + longest) // PAGE) + 1
        limits = EngineLimits(
            max_running=1, page_size=PAGE, cache_bytes=pages * PagedCache.page_bytes(llm, PAGE, self._dtype), graphs=False
        )
        engine = Engine(self.model, limits)
        engine.add(Request(example, SamplingParams(max_tokens=longest, temperature=temperature, seed=seed)))
        stream = TextStream(self.model.tokenizer.decode)
        while engine.active:
            for _, event in engine.step():
                match event:
                    case Token(token, _, place):
                        for written in [token] if reader is None else reader.push(token, place):
                            yield stream.push(written)
                    case End():
                        for written in [] if reader is None else reader.finish():
                            yield stream.push(written)
                        yield stream.finish()
                    case Failed(failure):
                        raise failure
