"""From a request to the events of its answer: checks, media, tokens, text. Knows nothing of HTTP, Ray or torch."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np

from molmo_core.generation.engine.grammars import Grammars
from molmo_core.generation.engine.requests import SamplingParams
from pipelines.serving.answer import Answer, Format
from pipelines.serving.api.chat import ChatRequest
from pipelines.serving.api.chat_answer import ChatFormat
from pipelines.serving.api.completions import CompletionFormat, CompletionRequest
from pipelines.serving.api.fields import read
from pipelines.serving.api.logprobs import LogprobWriter
from pipelines.serving.api.messages import Turn, conversation
from pipelines.serving.api.responses import ResponsesRequest
from pipelines.serving.api.responses_answer import ResponsesFormat
from pipelines.serving.api.sampling import Sampling
from pipelines.serving.api.tokenise import DetokenizeRequest, TokenizeRequest
from pipelines.serving.choices import Choice, Choices
from pipelines.serving.config import ServeConfig
from pipelines.serving.errors import ApiError, bad_request, shown
from pipelines.serving.media.pool import Run, in_thread
from pipelines.serving.media.prompts import Prompts
from pipelines.serving.pieces import Generate, Pieces
from pipelines.serving.points import PointReader
from pipelines.serving.text_stream import TextStream
from pipelines.serving.traces import spans

Inputs = dict[str, Any]
"""Model inputs of a prompt, with `metadata`."""


class ChatService:
    """Answers requests to one model."""

    def __init__(
        self, config: ServeConfig, model: Any, generate: Generate, prepare: Run = in_thread, names: Sequence[str] | None = None
    ) -> None:
        """`model`: its configuration; `generate` begins an answer; `prepare` makes features of a medium; `names`: of all models here."""
        self.name = config.served_name
        self._names = [self.name] if names is None else names
        self.context: int = model.llm.max_sequence_length
        self._vocabulary: int = model.llm.embedding_size or model.llm.vocab_size
        self._config = config
        self._model = model
        self._generate = generate
        self._tokenizer = model.build_tokenizer()
        self._grammars = Grammars(lambda: self._tokenizer)
        self._logprobs = LogprobWriter(self._tokenizer)
        self._prompts = Prompts(config, model, prepare)
        # More text than this is more tokens than the context, whatever it says: known without tokenising it.
        self._max_text = min(config.max_text_bytes, self.context * self._tokenizer.max_bytes_per_token)

    async def start(self, body: Any) -> Answer:
        """Checks a chat request (parsed JSON) and begins its answer.

        Raises:
            ApiError: whatever is wrong with the request; so do the other methods.
        """
        chat = ChatRequest.parse(body)
        await self._check(chat, chat.n)
        inputs = await self._conversation(chat.turns, "messages")
        return self._begin(chat, ChatFormat(chat, self._logprobs), [inputs], chat.n, "messages")

    async def complete(self, body: Any) -> Answer:
        """The same for a request to continue texts."""
        request = read(CompletionRequest, body)
        await self._check(request, request.n * len(request.prompt))
        self._check_text(request.prompt, "prompt", each=True)
        prompts = [await asyncio.to_thread(self._raw, text) for text in request.prompt]
        return self._begin(request, CompletionFormat(request, self._logprobs), prompts, request.n, "prompt", strip=False)

    async def respond(self, body: Any) -> Answer:
        """The same for a request in the form of OpenAI's responses."""
        request = read(ResponsesRequest, body)
        await self._check(request, 1)
        inputs = await self._conversation(request.turns, "input")
        return self._begin(request, ResponsesFormat(request, self._logprobs), [inputs], 1, "input")

    async def tokenize(self, body: Any) -> dict[str, Any]:
        """The tokens of a text or a conversation."""
        request = read(TokenizeRequest, body)
        self.check_model(request.model)
        if request.prompt is not None:
            self._check_text([request.prompt], "prompt")
            inputs = await asyncio.to_thread(self._raw, request.prompt, request.add_special_tokens)
        else:
            inputs = await self._conversation(request.turns, "messages")
        tokens = inputs["input_ids"].tolist()
        # In a thread: there may be a quarter of a million.
        strings = await asyncio.to_thread(lambda: [self._logprobs.text(token) for token in tokens]) if request.return_token_strs else None
        return {"count": len(tokens), "max_model_len": self.context, "tokens": tokens, "token_strs": strings}

    async def detokenize(self, body: Any) -> dict[str, str]:
        """The text of tokens."""
        request = read(DetokenizeRequest, body)
        self.check_model(request.model)
        largest = self._tokenizer.vocab_size
        for i, token in enumerate(request.tokens):
            if token >= largest:
                raise bad_request(f"tokens[{i}]: the model has {largest:,} tokens; {token} is none of them.", f"tokens[{i}]")
        decode = self._tokenizer.decode
        return {"prompt": await asyncio.to_thread(decode, request.tokens, skip_special_tokens=False, truncate_at_eos=False)}

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 if a request names another model."""
        if name is not None and name != self.name:
            there = ", ".join(f"'{one}'" for one in self._names)
            message = f"The model {shown(name)} does not exist; this server has {there}."
            raise ApiError(404, message, "model", "model_not_found")

    async def _check(self, request: Sampling, answers: int) -> None:
        self.check_model(request.model)
        request.check_tokens(self._vocabulary)
        places = self._config.max_batch_size + self._config.max_queued_requests
        if answers > places:
            raise bad_request(f"'n' asks for {answers} answers; this server holds {places} at a time.", "n")
        if request.grammar is not None:
            try:
                await asyncio.to_thread(self._grammars.start, request.grammar)
            except (ValueError, RecursionError) as error:
                field = "structured_outputs" if request.structured_outputs else request.FORM
                raise bad_request(f"'{field}': {error}.", field, "invalid_grammar") from None

    def _check_text(self, texts: Sequence[str], field: str, each: bool = False) -> None:
        """Raises ApiError if there is too much text; `each` is a prompt of its own."""
        sizes = [len(text.encode()) for text in texts]
        total, longest = sum(sizes), max(sizes, default=0) if each else sum(sizes)
        if longest > self._max_text or total > self._config.max_text_bytes:
            size, limit = (longest, self._max_text) if longest > self._max_text else (total, self._config.max_text_bytes)
            message = f"The text has {size:,} bytes; this server takes {limit:,} (the model's context is {self.context} tokens)."
            raise bad_request(message, field, "context_length_exceeded")

    async def _conversation(self, turns: Sequence[Turn], field: str) -> Inputs:
        turns = conversation(turns, self._config.system_messages, field)
        self._check_text([turn.text for turn in turns], field)
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        with spans.span("media"):
            return await self._prompts.inputs(messages, [medium for turn in turns for medium in turn.media], field)

    def _raw(self, text: str, begin: bool = True) -> Inputs:
        """A text as it is."""
        ids = [self._tokenizer.bos_token_id] * begin + self._tokenizer.encode(text)
        return {"input_ids": np.array(ids, np.int64), "position_ids": np.arange(len(ids)), "metadata": {}}

    def _begin(self, request: Sampling, form: Format, prompts: Sequence[Inputs], n: int, field: str, strip: bool = True) -> Answer:
        """Begins n answers to each prompt."""
        lengths = [len(inputs["input_ids"]) for inputs in prompts]
        limits = [self._new_tokens(request, length, field) for length in lengths]
        params = [[request.params(limit, i) for i in range(n)] for limit in limits]
        metadata = [inputs.pop("metadata") for inputs in prompts]
        choices = [
            Choice(
                p * n + i,
                self._pieces(inputs, params[p][i]),
                self._text(request, strip),
                PointReader(metadata[p]),
                self._model.answer_reader(self._tokenizer, metadata[p]),
            )
            for p, inputs in enumerate(prompts)
            for i in range(n)
        ]
        return Answer(form, Choices(choices), sum(lengths), request.stream, metadata[0])

    def _pieces(self, inputs: Inputs, params: SamplingParams) -> Pieces:
        return spans.watched(self._generate(inputs, params), self.name, len(inputs["input_ids"]), params)

    def _text(self, request: Sampling, strip: bool) -> TextStream:
        return TextStream(self._tokenizer.decode, request.stop, request.include_stop_str_in_output, request.min_tokens, strip)

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
