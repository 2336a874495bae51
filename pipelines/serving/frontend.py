"""The HTTP side: reads requests, decodes images, tokenises, and writes answers. The model is elsewhere."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from molmo_core.models.base import BaseModelConfig
from pipelines import tracking
from pipelines.serving import schema
from pipelines.serving.config import ServeConfig
from pipelines.serving.errors import ApiError, bad_request
from pipelines.serving.media import decode_image
from pipelines.serving.schema import ChatRequest
from pipelines.serving.text_stream import TextStream

logger = logging.getLogger("ray.serve")
api = FastAPI(title="Molmo", docs_url=None, redoc_url=None)


@api.exception_handler(ApiError)
async def _api_error(request: Request, error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status)


@api.exception_handler(HTTPException)
async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    message = f"{request.method} {request.url.path}: {error.detail}. There are: POST /v1/chat/completions, GET /v1/models, GET /health."
    return JSONResponse(ApiError(error.status_code, message).body(), error.status_code)


@serve.ingress(api)
class Frontend:
    """The API of one served model."""

    def __init__(self, config: ServeConfig, model: str, engine: DeploymentHandle) -> None:
        self._config = config
        self._engine = engine
        self._created = int(time.time())
        model_config = BaseModelConfig.load(tracking.resolve(model))
        self._tokenizer = model_config.build_tokenizer()
        self._preprocess = model_config.build_preprocessor(for_inference=True, is_training=False)
        self._context = model_config.llm.max_sequence_length

    @api.get("/health")
    async def health(self) -> dict[str, str]:
        """Answers once the model is loaded and working."""
        await self._engine.active.remote()
        return {"status": "ok"}

    @api.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        entry = {"id": self._config.served_name, "object": "model", "created": self._created, "owned_by": "molmo-pipelines"}
        return {"object": "list", "data": [{**entry, "max_model_len": self._context}]}

    @api.post("/v1/chat/completions")
    async def chat_completions(self, request: Request) -> Response:
        """OpenAI's chat completions; `pipelines.serving.schema` says which part of it."""
        chat = ChatRequest.parse(await self._read_json(request))
        if chat.model != self._config.served_name:
            message = f"The model '{chat.model}' does not exist; this server has '{self._config.served_name}'."
            raise ApiError(404, message, "model", "model_not_found")
        example = await asyncio.to_thread(self._prepare, chat)
        answer = _Answer(self, chat, example)
        if not chat.stream:
            return JSONResponse(await answer.whole())
        first = await answer.first()  # what fails before the first token still gets an HTTP status
        return StreamingResponse(answer.events(first), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def _read_json(self, request: Request) -> Any:
        limit = self._config.max_body_bytes
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise ApiError(413, f"The request is larger than the {limit:,} bytes that this server takes.", None, "request_too_large")
        try:
            return json.loads(body)
        except ValueError as error:
            raise bad_request(f"The body is not valid JSON: {error}.") from error

    def _prepare(self, chat: ChatRequest) -> dict[str, Any]:
        """Model inputs of a request (runs in a thread: decoding must not hold up other requests)."""
        urls = [
            (url, f"messages[{i}].content[{j}].image_url.url")
            for i, message in enumerate(chat.messages)
            for j, url in enumerate_images(message)
        ]
        if len(urls) > self._config.max_images:
            raise bad_request(f"{len(urls)} images; this server takes at most {self._config.max_images} in a request.", "messages")
        images = [decode_image(url, self._config.max_image_pixels, where) for url, where in urls]
        example: dict[str, Any] = {"messages": [{"role": message.role, "content": message.text} for message in chat.messages]}
        if images:
            example |= {"image": images[0]} if len(images) == 1 else {"images": images}
        try:
            inputs = self._preprocess(example)
        except ValueError as error:
            raise bad_request(f"The model cannot read this conversation: {error}.", "messages") from error
        inputs.pop("metadata", None)
        return inputs

    def new_tokens(self, chat: ChatRequest, prompt_tokens: int) -> int:
        """How long the answer may get."""
        room = self._context - prompt_tokens
        if room < (chat.new_tokens or 1):
            raise bad_request(
                f"The prompt has {prompt_tokens} tokens (images included) and the answer may have {chat.new_tokens or 1}, "
                f"but the model's context is {self._context} tokens.",
                "messages",
                "context_length_exceeded",
            )
        return chat.new_tokens or min(self._config.max_new_tokens, room)


def enumerate_images(message: schema.Message) -> list[tuple[int, str]]:
    """(position in the content, URL) of a message's images."""
    return [(j, part.image_url.url) for j, part in enumerate(message.content) if isinstance(part, schema.ImagePart)]


class _Answer:
    """One answer on its way from the engine to the client."""

    def __init__(self, frontend: Frontend, chat: ChatRequest, example: dict[str, Any]) -> None:
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._chat = chat
        self._prompt_tokens = len(example["input_ids"])
        self._text = TextStream(frontend._tokenizer.decode, chat.stops)
        self._tokens = 0
        self._finish_reason: str | None = None
        limit = frontend.new_tokens(chat, self._prompt_tokens)
        engine = frontend._engine.options(stream=True)
        self._pieces = engine.generate.remote(example, limit, chat.temperature, chat.top_p, chat.seed)

    async def next(self) -> str | None:
        """Text that has become certain; None after the end."""
        if self._finish_reason is not None:
            return None
        try:
            piece = await anext(self._pieces)
        except BackPressureError as error:
            raise ApiError(503, "The server is busy; try again in a moment.", None, "overloaded") from error
        except RayActorError as error:
            raise ApiError(503, "The model's process ended during this answer; try again.", None, "replica_lost") from error
        text = ""
        for token in piece.tokens:
            self._tokens += 1
            text += self._text.push(token)
            if self._text.stopped:
                self._finish_reason = "stop"
                self._pieces.cancel()
                return text
        self._finish_reason = piece.finish_reason
        return text + self._text.finish() if self._finish_reason else text

    async def first(self) -> str:
        return await self.next() or ""

    async def whole(self) -> dict[str, Any]:
        """The answer of a request that is not streamed."""
        text = ""
        while (part := await self.next()) is not None:
            text += part
        assert self._finish_reason is not None
        return schema.completion(self._id, self._created, self._chat.model, text, self._finish_reason, self._usage())

    async def events(self, text: str | None) -> AsyncIterator[str]:
        """Server-sent events; an error after the first one can only be an event."""
        try:
            yield self._event(self._chunk({"role": "assistant", "content": ""}))
            while text is not None:
                if text:
                    yield self._event(self._chunk({"content": text}))
                text = await self.next()
            yield self._event(self._chunk({}, self._finish_reason))
            if self._chat.stream_options and self._chat.stream_options.include_usage:
                yield self._event({**self._chunk({}), "choices": [], "usage": self._usage()})
        except ApiError as error:
            yield self._event(error.body())
        except Exception:
            logger.exception("An answer failed while it was streamed")
            yield self._event(ApiError(500, "The server failed while writing this answer.").body())
        yield "data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        return schema.chunk(self._id, self._created, self._chat.model, delta, finish_reason)

    def _usage(self) -> dict[str, int]:
        return schema.usage(self._prompt_tokens, self._tokens)

    @staticmethod
    def _event(body: dict[str, Any]) -> str:
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
