"""From a request to the events of its answer: checks, media, tokens, text. Knows nothing of HTTP, Ray or torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipelines.serving.answer import Answer
from pipelines.serving.api.chat import ChatRequest
from pipelines.serving.api.chat_answer import ChatFormat
from pipelines.serving.api.logprobs import LogprobWriter
from pipelines.serving.api.messages import Turn, conversation
from pipelines.serving.api.sampling import Sampling
from pipelines.serving.choices import Choice, Choices
from pipelines.serving.config import ServeConfig
from pipelines.serving.errors import ApiError, bad_request, shown
from pipelines.serving.media.pool import Run, in_thread
from pipelines.serving.media.prompts import Prompts
from pipelines.serving.pieces import Generate
from pipelines.serving.text_stream import TextStream


class ChatService:
    """Answers requests to one model."""

    def __init__(self, config: ServeConfig, model: Any, generate: Generate, prepare: Run = in_thread) -> None:
        """`model`: its configuration; `generate` begins an answer; `prepare` makes features of a medium."""
        self.name = config.served_name
        self.context: int = model.llm.max_sequence_length
        self._vocabulary: int = model.llm.embedding_size or model.llm.vocab_size
        self._config = config
        self._generate = generate
        self._tokenizer = model.build_tokenizer()
        self._logprobs = LogprobWriter(self._tokenizer)
        self._prompts = Prompts(config, model, prepare)
        # More text than this is more tokens than the context, whatever it says: known without tokenising it.
        self._max_text = min(config.max_text_bytes, self.context * self._tokenizer.max_bytes_per_token)

    async def start(self, body: Any) -> Answer:
        """Checks a chat request and begins its answer.

        Args:
            body: the parsed JSON.

        Raises:
            ApiError: whatever is wrong with the request.
        """
        chat = ChatRequest.parse(body)
        self._check(chat, chat.n)
        turns = conversation(chat.turns, self._config.system_messages)
        self._check_text([turn.text for turn in turns], "messages")
        inputs = await self._inputs(turns, "messages")
        metadata = inputs.pop("metadata")
        prompt_tokens = len(inputs["input_ids"])
        choices = self._choices(chat, inputs, chat.n, "messages")
        return Answer(ChatFormat(chat, self._logprobs), choices, chat.n, prompt_tokens, chat.stream, metadata)

    def _check(self, request: Sampling, answers: int) -> None:
        if request.model != self.name:
            message = f"The model {shown(request.model)} does not exist; this server has '{self.name}'."
            raise ApiError(404, message, "model", "model_not_found")
        request.check_tokens(self._vocabulary)
        places = self._config.max_batch_size + self._config.max_queued_requests
        if answers > places:
            raise bad_request(f"'n' asks for {answers} answers; this server holds {places} at a time.", "n")

    def _check_text(self, texts: Sequence[str], field: str) -> None:
        size = sum(len(text.encode()) for text in texts)
        if size > self._max_text:
            message = f"The text has {size:,} bytes; this server takes {self._max_text:,} (the model's context is {self.context} tokens)."
            raise bad_request(message, field, "context_length_exceeded")

    async def _inputs(self, turns: Sequence[Turn], field: str) -> dict[str, Any]:
        """Model inputs of a conversation, and their `metadata`."""
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        return await self._prompts.inputs(messages, [medium for turn in turns for medium in turn.media], field)

    def _choices(self, request: Sampling, inputs: dict[str, Any], count: int, field: str) -> Choices:
        """Begins the answers to one prompt."""
        max_tokens = self._new_tokens(request, len(inputs["input_ids"]), field)
        params = [request.params(max_tokens, i) for i in range(count)]
        return Choices([Choice(i, self._generate(inputs, each), self._text(request)) for i, each in enumerate(params)])

    def _text(self, request: Sampling) -> TextStream:
        return TextStream(self._tokenizer.decode, request.stops, request.include_stop_str_in_output, request.min_tokens)

    def _new_tokens(self, request: Sampling, prompt_tokens: int, field: str) -> int:
        """How long the answer may get."""
        room = self.context - prompt_tokens
        if room < (request.new_tokens or 1):
            raise bad_request(
                f"The prompt has {prompt_tokens} tokens (images included) and the answer may have {request.new_tokens or 1}, "
                f"but the model's context is {self.context} tokens.",
                field,
                "context_length_exceeded",
            )
        return request.new_tokens or min(self._config.max_new_tokens, room)
