"""From a request to the events of its answer: checks, media, tokens, text. Knows nothing of HTTP, Ray or torch."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from molmo_core.generation.engine.requests import SamplingParams
from pipelines.serving import schema
from pipelines.serving.config import ServeConfig
from pipelines.serving.errors import ApiError, as_api_error, bad_request, shown
from pipelines.serving.media.parts import Medium
from pipelines.serving.media.pool import Run, in_thread
from pipelines.serving.media.prompts import Prompts
from pipelines.serving.pieces import Generate, Pieces
from pipelines.serving.schema import ChatRequest
from pipelines.serving.text_stream import TextStream

logger = logging.getLogger(__name__)


class ChatService:
    """Answers chat requests to one model."""

    def __init__(self, config: ServeConfig, model: Any, generate: Generate, prepare: Run = in_thread) -> None:
        """`model`: its configuration; `generate` begins an answer; `prepare` makes features of a medium."""
        self.name = config.served_name
        self.context: int = model.llm.max_sequence_length
        self._config = config
        self._generate = generate
        self._tokenizer = model.build_tokenizer()
        self._prompts = Prompts(config, model, prepare)
        # More text than this is more tokens than the context, whatever it says: known without tokenising it.
        self._max_text = min(config.max_text_bytes, self.context * self._tokenizer.max_bytes_per_token)

    async def start(self, body: Any) -> Answer:
        """Checks a request and begins its answer.

        Args:
            body: the parsed JSON.

        Raises:
            ApiError: whatever is wrong with the request.
        """
        chat = ChatRequest.parse(body)
        if chat.model != self.name:
            message = f"The model {shown(chat.model)} does not exist; this server has '{self.name}'."
            raise ApiError(404, message, "model", "model_not_found")
        self._check_text(chat)
        inputs = await self._prompts.inputs([{"role": m.role, "content": m.text} for m in chat.messages], _media(chat))
        metadata = inputs.pop("metadata")
        prompt_tokens = len(inputs["input_ids"])
        params = SamplingParams(self._new_tokens(chat, prompt_tokens), temperature=chat.temperature, top_p=chat.top_p, seed=chat.seed)
        pieces = self._generate(inputs, params)
        return Answer(chat, prompt_tokens, metadata, pieces, TextStream(self._tokenizer.decode, chat.stops))

    def _check_text(self, chat: ChatRequest) -> None:
        size = sum(len(message.text.encode()) for message in chat.messages)
        if size > self._max_text:
            message = f"The text has {size:,} bytes; this server takes {self._max_text:,} (the model's context is {self.context} tokens)."
            raise bad_request(message, "messages", "context_length_exceeded")

    def _new_tokens(self, chat: ChatRequest, prompt_tokens: int) -> int:
        """How long the answer may get."""
        room = self.context - prompt_tokens
        if room < (chat.new_tokens or 1):
            raise bad_request(
                f"The prompt has {prompt_tokens} tokens (images included) and the answer may have {chat.new_tokens or 1}, "
                f"but the model's context is {self.context} tokens.",
                "messages",
                "context_length_exceeded",
            )
        return chat.new_tokens or min(self._config.max_new_tokens, room)


class Answer:
    """One answer on its way from the engine to the client."""

    def __init__(self, chat: ChatRequest, prompt_tokens: int, metadata: dict[str, Any], pieces: Pieces, text: TextStream) -> None:
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._chat = chat
        self._prompt_tokens = prompt_tokens
        self._pieces = pieces
        self._text = text
        self._tokens = 0
        self._finish_reason: str | None = None
        self.streamed = chat.stream
        self.metadata = metadata
        """What the preprocessor says about the prompt, e.g. `image_sizes` [(width, height)]."""

    async def next(self) -> str | None:
        """Text that has become certain; None after the end."""
        if self._finish_reason is not None:
            return None
        piece = await self._pieces.__anext__()
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

    async def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        text = ""
        while (part := await self.next()) is not None:
            text += part
        assert self._finish_reason is not None
        return schema.completion(self._id, self._created, self._chat.model, text, self._finish_reason, self._usage())

    async def events(self, first: str | None) -> AsyncIterator[str]:
        """Server-sent events of a streamed answer, from its first text on. What fails from here on can only be told as an event."""
        try:
            yield _event(self._chunk({"role": "assistant", "content": ""}))
            text = first
            while text is not None:
                if text:
                    yield _event(self._chunk({"content": text}))
                text = await self.next()
            yield _event(self._chunk({}, self._finish_reason))
            if self._chat.stream_options and self._chat.stream_options.include_usage:
                yield _event({**self._chunk({}), "choices": [], "usage": self._usage()})
        except Exception as error:  # of whatever the model or the connection to it raises: logged, and told to the client
            logger.exception("An answer failed while it was streamed")
            yield _event(as_api_error(error).body())
        yield "data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        return schema.chunk(self._id, self._created, self._chat.model, delta, finish_reason)

    def _usage(self) -> dict[str, int]:
        return schema.usage(self._prompt_tokens, self._tokens)


def _media(chat: ChatRequest) -> list[Medium]:
    """The pictures of a conversation, in order."""
    return [
        Medium("image", part.image_url.url, f"messages[{i}].content[{j}].image_url.url")
        for i, message in enumerate(chat.messages)
        for j, part in enumerate(message.content)
        if isinstance(part, schema.ImagePart)
    ]


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
