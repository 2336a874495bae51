"""From a checked conversation to model inputs: its media are prepared beside, its text here."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from typing import Any

from molmo_core.preprocessing.video_preprocessor import VideoOlmoPreprocessor, VideoPreprocessor
from pipelines.serving.config import ServeConfig
from pipelines.serving.errors import bad_request, clipped
from pipelines.serving.media.cache import MediaCache
from pipelines.serving.media.features import Features, Limits, Task, Unusable
from pipelines.serving.media.fetching import Fetcher
from pipelines.serving.media.parts import Kind, Medium
from pipelines.serving.media.pool import Run, in_thread


class Prompts:
    """Makes the inputs of one model.

    Args:
        config: limits.
        model: its configuration.
        run: prepares one medium (a `MediaPool`). Text alone never needs it.
    """

    def __init__(self, config: ServeConfig, model: Any, run: Run = in_thread) -> None:
        self._config, self._run = config, run
        self._limits = Limits.of(config)
        self._preprocess = model.build_preprocessor(for_inference=True, is_training=False)
        hosts = config.allowed_media_hosts
        self._fetch = Fetcher(hosts, config.max_media_bytes, config.fetch_timeout_s, config.max_queued_media) if hosts else None
        self.cache = MediaCache(config.media_cache_bytes)

    async def inputs(self, messages: Sequence[dict[str, str]], media: Sequence[Medium], field: str = "messages") -> dict[str, Any]:
        """The arrays that the model is given, and `metadata`: `image_sizes` [(width, height)], or `video_size` and `frame_times`, seconds.

        Args:
            messages: `role` and `content`, user and assistant in turn.
            media: of all messages, in order.
            field: the messages' name in the request, for errors.

        Raises:
            ApiError: 400: the message says which medium, and why; 429: too many media wait.
        """
        self._check(media, field)
        example: dict[str, Any] = {"messages": list(messages), "placeholders": False}
        if media:
            try:
                async with asyncio.TaskGroup() as group:  # the first error ends the others
                    tasks = [group.create_task(self._features(medium, len(media))) for medium in media]
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
            features = [task.result() for task in tasks]
            example |= {"video": features[0]} if media[0].kind == "video" else {"images": features}
        return await asyncio.to_thread(self._assembled, example, field)

    def _check(self, media: Sequence[Medium], field: str) -> None:
        limit = self._config.max_images
        videos = [medium for medium in media if medium.kind == "video"]
        if len(media) > limit:
            raise bad_request(f"{len(media)} images; this server takes at most {limit} in a request.", field)
        if videos and len(media) > 1:
            second = videos[1] if len(videos) > 1 else videos[0]
            raise bad_request(f"{second.where}: one video, or images, not both, and not several videos.", second.where)
        for medium in media[:1]:
            if medium.kind not in self._kinds:
                message = f"{medium.where}: this model takes no {medium.kind}s."
                raise bad_request(message, medium.where, f"{medium.kind}s_not_supported")

    @property
    def _kinds(self) -> set[Kind]:
        """What the model can be shown."""
        if self._preprocess.settings is None:
            return set()
        if isinstance(self._preprocess, VideoOlmoPreprocessor):
            return {"video"}
        return {"image", "video"} if isinstance(self._preprocess, VideoPreprocessor) else {"image"}

    async def _features(self, medium: Medium, count: int) -> Features:
        """Of one of `count` media."""
        fetched = None
        if medium.is_address:
            if self._fetch is None:
                message = (
                    f"{medium.where}: this server fetches no addresses. Send the {medium.kind} itself: data:{medium.kind}/...;base64,..."
                )
                raise bad_request(message, medium.where, "url_not_supported")
            fetched = await self._fetch(medium)
        task, key = await asyncio.to_thread(self._task, medium, fetched, count)
        features = self.cache.get(key)
        if features is not None:
            return features
        result = await self._run(task)
        if isinstance(result, Unusable):
            raise bad_request(f"{medium.where}: {clipped(result.message, 300)}.", medium.where, result.code)
        self.cache.put(key, result)
        return result

    def _task(self, medium: Medium, fetched: bytes | None, count: int) -> tuple[Task, tuple[Any, ...]]:
        """What is to be done for a medium, and the name of its result in the cache."""
        data, is_base64 = (medium.base64(), True) if fetched is None else (fetched, False)
        try:
            settings = self._preprocess.settings if medium.kind == "video" else self._preprocess.image_settings(count)
        except ValueError as error:
            raise bad_request(f"{medium.where}: {error}.", medium.where) from None
        frames = self._preprocess.frame_settings if medium.kind == "video" else None
        key = (hashlib.sha256(data).digest(), is_base64, settings, frames)
        return Task(data, is_base64, settings, frames, self._limits), key

    def _assembled(self, example: dict[str, Any], field: str) -> dict[str, Any]:
        try:
            return dict(self._preprocess(example))
        except ValueError as error:
            raise bad_request(f"The model cannot read this conversation: {clipped(str(error), 300)}.", field) from error
