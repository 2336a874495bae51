"""Answers that have to be of a form: which tokens may come next, computed on the host by llguidance for those who ask for it."""

from __future__ import annotations

import collections
import json
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from molmo_core.generation.engine.requests import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from molmo_core.preprocessing.tokenizer import Tokenizer

KEPT = 64
"""Compiled grammars that are kept, least recently used first to go."""
COMPILERS = 2
"""Threads that compile: a large grammar does not hold up a small one."""
MAX_CHARACTERS = 65_536
"""Of the text of a grammar."""
BLANKS = r"\n?[ ]{0,40}"
"""Between the parts of JSON: enough to indent it, and not so many that a model writes nothing else."""


class GrammarState:
    """How far one answer has come."""

    def __init__(self, matcher: LLMatcher, tokens: int):
        """`tokens`: how many the matcher knows, those of text."""
        self._matcher, self._tokens = matcher, tokens

    def allow(self, mask: np.ndarray) -> None:
        """Writes the next tokens that are allowed: bit i of int32 [E / 32, rounded up] is token i. If `push` will fail: the end token.

        MolmoPoint has logits of tokens that are no text; their bits stay 0.
        """
        known = mask[: -(-self._tokens // 32)]
        self._matcher.unsafe_compute_mask_ptr(known.ctypes.data, known.nbytes)

    def push(self, token: int) -> None:
        """Adds a token, one that was allowed.

        Raises:
            ValueError: there is no way to go on, or there are too many.
        """
        self._matcher.consume_token(token)
        self.check()

    def check(self) -> None:
        """Raises ValueError if there is no way to go on, or there are too many."""
        if self._matcher.is_error():
            raise ValueError(f"grammar: it cannot be followed: {_short(self._matcher.get_error())}")

    @property
    def complete(self) -> bool:
        """Whether nothing may follow but the end."""
        return bool(self._matcher.is_stopped())


class Grammars:
    """Compiles grammars for a tokenizer. Any thread may call it."""

    def __init__(self, tokenizer: Callable[[], Tokenizer]):
        """`tokenizer`: asked for when the first grammar comes; a model without one generates, too."""
        self._text_tokenizer = tokenizer
        self._tokenizer: LLTokenizer | None = None
        self._compiled: collections.OrderedDict[Grammar, LLMatcher] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._compiler = ThreadPoolExecutor(COMPILERS, "grammars")

    def start(self, grammar: Grammar) -> GrammarState:
        """The state of an answer that has no token yet. Fast if this grammar was seen not long ago.

        Raises:
            ValueError: it is not a grammar; the message says what is wrong.
        """
        with self._lock:
            matcher = self._compiled.get(grammar)
        if matcher is None:
            matcher = self._compile(grammar)  # twice perhaps, but nobody waits for another's
        with self._lock:
            self._compiled[grammar] = matcher
            self._compiled.move_to_end(grammar)
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        return GrammarState(matcher.deep_copy(), self._words().vocab_size)

    def compile(self, grammar: Grammar) -> Future[GrammarState]:
        """`start` in a thread of its own."""
        return self._compiler.submit(self.start, grammar)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits  # 7 MB that only those need who ask for it

        if len(grammar.text) > MAX_CHARACTERS:
            raise ValueError(f"grammar: {len(grammar.text):,} characters; at most {MAX_CHARACTERS:,} are taken")
        matcher = LLMatcher(self._words(), _source(grammar), log_level=0, limits=LLParserLimits(verbose_errors=False))
        matcher.compute_bitmask()  # an error if there is no first token
        GrammarState(matcher, self._words().vocab_size).check()
        return matcher

    def _words(self) -> LLTokenizer:
        """The text tokenizer, without the tokens of media: no text has those."""
        from llguidance import LLTokenizer

        with self._lock:
            if self._tokenizer is not None:
                return self._tokenizer
            tokenizer = self._text_tokenizer()
            self._tokenizer = LLTokenizer(tokenizer.backend.to_str(), n_vocab=tokenizer.first_special_id, eos_token=tokenizer.eos_token_id)
        return self._tokenizer


def _source(grammar: Grammar) -> str:
    """The grammar in llguidance's form, with one blank before it."""
    from llguidance import LLMatcher

    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(f" ?(?:{grammar.text})")
    value = _json(grammar)
    if grammar.kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(option, str) and option for option in value):
            raise ValueError("grammar: a choice is a JSON list of strings, none of them empty")
        return LLMatcher.grammar_from_regex(f" ?(?:{'|'.join(map(re.escape, value))})")
    if not isinstance(value, dict):
        raise ValueError(f"grammar: a JSON schema is an object, not {_short(json.dumps(value))}")
    return "start: / ?/ answer\nanswer: %json " + json.dumps(value | {"x-guidance": {"whitespace_pattern": BLANKS}})


def _json(grammar: Grammar) -> Any:
    try:
        return json.loads(grammar.text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"grammar: not JSON: {_short(str(error))}") from None


def _short(text: str) -> str:
    """What a client is told of the library's message: without where in its own form of the grammar it is, and not all of it."""
    text = re.sub(r"^at \d+\(\d+\): |failed to compile JSON schema: |(?s:\n? *\d+ \| .*)", "", text)
    text = " ".join(text.split())
    return text if len(text) <= 100 else text[:100] + "…"
