"""The fields that say how tokens are chosen and when an answer ends: the same for every endpoint, and as the engine names them."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from molmo_core.generation.engine.requests import Grammar, SamplingParams
from pipelines.serving.api.fields import Strict, as_list
from pipelines.serving.api.forms import StructuredOutputs
from pipelines.serving.errors import bad_request

MAX_STOPS, MAX_STOP_LENGTH, MAX_STOP_TOKENS = 4, 1000, 64
MAX_BIASES = 300
"""Tokens that a request may favour or hinder: each costs time in every step."""
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenName = Annotated[str, StringConstraints(pattern=r"^(0|[1-9][0-9]{0,8})$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(Strict):
    include_usage: bool = False
    """A last event with the tokens of prompt and answers."""
    include_obfuscation: bool = Field(default=False, json_schema_extra={"const": False})

    @model_validator(mode="after")
    def _plain(self) -> StreamOptions:
        if self.include_obfuscation:
            raise bad_request("'stream_options.include_obfuscation': only False is supported.", "stream_options.include_obfuscation")
        return self


class Sampling(Strict):
    """Fields of every endpoint that generates."""

    FORM: ClassVar[str] = "structured_outputs"
    """The field that says what the answer has to be, beside `structured_outputs`."""

    model: str
    stream: bool = False
    """Server-sent events while the answer is generated."""
    temperature: float = Field(default=0.0, ge=0, le=2)
    """0 (the default): greedy, so that the same request gives the same answer."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the most probable tokens whose probabilities sum to this."""
    top_k: int = Field(default=0, ge=-1, lt=2**31)
    """Draw from so many most probable tokens; 0 and -1: all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Draw from tokens at least so probable, relative to the most probable one."""
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100)
    """Above 1: less of what prompt and answer hold already."""
    presence_penalty: Penalty = 0.0
    """Above 0: less of what the answer holds already."""
    frequency_penalty: Penalty = 0.0
    """Above 0: less of what the answer holds already, for each time it does."""
    logit_bias: dict[TokenName, Bias] = Field(
        default_factory=dict, max_length=MAX_BIASES, json_schema_extra={"additionalProperties": False}
    )
    """Added to the logits of tokens, by their ids."""
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    """The same request with the same seed gives the same answer, whoever else is served."""
    min_tokens: int = Field(default=0, ge=0, lt=2**31)
    """The answer does not end before so many tokens."""
    stop: Annotated[list[str], BeforeValidator(as_list, json_schema_input_type=str | list[str])] = Field(default_factory=list)
    """Up to four strings that end the answer before them."""
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=MAX_STOP_TOKENS)
    """Tokens that end the answer before them."""
    include_stop_str_in_output: bool = False
    """The stop string is the end of the answer, rather than what follows it."""
    ignore_eos: bool = False
    """Go on after the model's end token (benchmarks)."""

    structured_outputs: StructuredOutputs | None = None
    """What the answer has to be."""

    @property
    def grammar(self) -> Grammar | None:
        """What the answer has to be."""
        return self.structured_outputs.grammar if self.structured_outputs else None

    @property
    def top_tokens(self) -> int | None:
        """How many of the most probable tokens to tell with each token; None: no probabilities."""
        return None

    @property
    def new_tokens(self) -> int | None:
        """The limit that the request sets (None: the server's)."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _check_stops(self) -> Any:
        if len(self.stop) > MAX_STOPS or not all(0 < len(stop) <= MAX_STOP_LENGTH for stop in self.stop):
            raise bad_request(f"'stop' takes one to four strings of 1 to {MAX_STOP_LENGTH:,} characters.", "stop")
        return self

    def check_tokens(self, vocabulary: int) -> None:
        """Raises ApiError when a token that is named by its id is not one of the model's (0 .. vocabulary - 1)."""
        for name, ids in (("logit_bias", map(int, self.logit_bias)), ("stop_token_ids", iter(self.stop_token_ids))):
            for token in ids:
                if token >= vocabulary:
                    raise bad_request(f"'{name}': the model has {vocabulary:,} tokens; {token} is none of them.", name)

    def params(self, max_tokens: int, choice: int = 0) -> SamplingParams:
        """What the engine is asked for.

        Args:
            max_tokens: length of the answer at most.
            choice: of several answers, which; it is drawn with `seed + choice`.

        Raises:
            ApiError: the answer could never be long enough.
        """
        if self.min_tokens > max_tokens:
            raise bad_request(f"'min_tokens' is {self.min_tokens}, but the answer may have {max_tokens} tokens at most.", "min_tokens")
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias={int(token): bias for token, bias in self.logit_bias.items()},
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=self.top_tokens,
            grammar=self.grammar,
            seed=None if self.seed is None else _signed(self.seed + choice),
        )


class Several(Strict):
    """Fields of the endpoints that give several answers to one prompt, and tell of usage in a stream on request."""

    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    """Answers to the same prompt; answer number i (from 0) is drawn with `seed + i`."""
    stream_options: StreamOptions | None = None

    def check_stream_options(self) -> None:
        """Raises ApiError when there are options of a stream, and no stream."""
        if self.stream_options and not getattr(self, "stream", False):
            raise bad_request("'stream_options' needs 'stream': true.", "stream_options")


def _signed(number: int) -> int:
    """Brought back into 64 bits."""
    return (number + 2**63) % 2**64 - 2**63
