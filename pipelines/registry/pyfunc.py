"""A registered version as MLflow loads it: `mlflow.pyfunc.load_model("models:/name@champion").predict(frame)`.

Travels with the version, beside `molmo_core`, and imports nothing else of this project: no Ray, no pipelines.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd
import torch
from mlflow.exceptions import MlflowException

from molmo_core.checkpoint import load_model
from molmo_core.generation.engine.engine import Engine, EngineLimits
from molmo_core.generation.engine.paged import PagedCache
from molmo_core.generation.engine.requests import Failed, Request, SamplingParams, Token
from molmo_core.generation.generate import answer_text
from molmo_core.preprocessing.media import MediaError, image_size, load_image

PROMPT, IMAGE, ANSWER = "prompt", "image", "answer"
MAX_TOKENS = 200
"""Length of an answer unless `params={"max_tokens": ...}` says otherwise."""
ROWS = 16
"""Answered together; pictures of more are never in memory at once."""
PAGE = 64
_DATA_URL = "data:image/"
_SHOWN = 5


class Predictor:
    """A loaded model that answers the rows of a frame. Greedy, so the same frame gives the same answers.

    Args:
        checkpoint: the version's folder of weights, configuration and tokenizer. On a GPU the weights are bfloat16, else float32.
    """

    def __init__(self, checkpoint: str) -> None:
        gpu = torch.cuda.is_available()
        self._dtype = torch.bfloat16 if gpu else torch.float32
        self._model: Any = load_model(checkpoint, self._dtype, "cuda" if gpu else "cpu").eval()
        self._preprocess = self._model.config.build_preprocessor(for_inference=True, is_training=False)

    def predict(self, frame: pd.DataFrame, params: Mapping[str, Any] | None = None) -> pd.Series:
        """The answers, with the frame's index.

        Args:
            frame: a row a question: `prompt` (text) and, unless no row shows a picture, `image`: the path of a file on this machine,
                its bytes, a `data:image/...;base64,` address, or None.
            params: `max_tokens`, the longest answer in tokens.

        Raises:
            MlflowException: rows that cannot be answered, by their index and with the reason; nothing is generated if that can be seen
                before (types, files that are missing or are no pictures).
        """
        longest = int((params or {}).get("max_tokens", MAX_TOKENS))
        if longest < 1:
            raise _invalid(f"max_tokens={longest}: at least 1")
        if not isinstance(frame, pd.DataFrame) or PROMPT not in frame:
            raise _invalid(f"a DataFrame with the columns {PROMPT!r} and {IMAGE!r} is wanted (docs/registry.md)")
        pictures = frame[IMAGE] if IMAGE in frame else [None] * len(frame)
        rows = [(index, prompt, _source(image)) for index, prompt, image in zip(frame.index, frame[PROMPT], pictures)]
        _report([(index, why) for index, prompt, image in rows if (why := _problem(prompt, image))], len(rows))
        answers: list[str] = []
        for start in range(0, len(rows), ROWS):
            answers += self._answers(rows[start : start + ROWS], longest)
        return pd.Series(answers, index=frame.index, name=ANSWER, dtype=object)

    def _answers(self, rows: list[tuple[Any, str, Any]], longest: int) -> list[str]:
        llm = self._model.config.llm
        examples, problems = [], []
        for index, prompt, image in rows:
            try:
                media = {} if image is None else {"image": load_image(image)}
                example = self._preprocess({**media, "messages": [{"role": "user", "content": prompt}], "placeholders": False})
                if (length := len(example["input_ids"])) >= llm.max_sequence_length:
                    raise ValueError(f"the prompt has {length:,} tokens, picture included; the context is {llm.max_sequence_length:,}")
                examples.append(example)
            except ValueError as error:
                problems.append((index, str(error)))
        _report(problems, len(rows))
        lengths = [len(example["input_ids"]) for example in examples]
        limits = [min(longest, llm.max_sequence_length - length) for length in lengths]
        pages = sum(-(-(length + limit) // PAGE) + 1 for length, limit in zip(lengths, limits))
        engine = Engine(
            self._model,
            EngineLimits(max_running=ROWS, page_size=PAGE, cache_bytes=pages * PagedCache.page_bytes(llm, PAGE, self._dtype), graphs=False),
        )
        about = [example.pop("metadata", None) or {} for example in examples]
        requests = [Request(example, SamplingParams(max_tokens=limit)) for example, limit in zip(examples, limits)]
        for request in requests:
            engine.add(request)
        tokens: dict[int, list[int]] = {id(request): [] for request in requests}
        places: dict[int, list[int]] = {id(request): [] for request in requests}
        for request, event in _events(engine):
            match event:
                case Token(token, _, place):
                    tokens[id(request)].append(token)
                    places[id(request)].append(place)
                case Failed(failure):
                    raise failure
        return [
            answer_text(self._model, tokens[id(request)], places[id(request)], known).strip() for request, known in zip(requests, about)
        ]


def _events(engine: Engine) -> Iterator[tuple[Request, Any]]:
    while engine.active:
        yield from engine.step()


def _source(image: Any) -> Any:
    """None for what means that there is no picture; the bytes of a data URL."""
    if image is None or (isinstance(image, float) and image != image) or image is pd.NA:
        return None
    if isinstance(image, str) and image.startswith(_DATA_URL):
        try:
            return base64.b64decode(image.partition(",")[2], validate=True)
        except binascii.Error:
            return b""
    return image


def _problem(prompt: Any, image: Any) -> str | None:
    """Why a row cannot be answered, as far as is seen without decoding its picture."""
    if not isinstance(prompt, str) or not prompt.strip():
        return f"{PROMPT}: {type(prompt).__name__ if not isinstance(prompt, str) else 'an empty text'}, text is wanted"
    if image is None:
        return None
    if not isinstance(image, str | bytes | bytearray | memoryview):
        return f"{IMAGE}: {type(image).__name__}; the path of a file, its bytes or a data:image/ address is wanted"
    try:
        image_size(image)
    except (MediaError, OSError) as error:
        return f"{IMAGE}: {error}"
    return None


def _report(problems: list[tuple[Any, str]], rows: int) -> None:
    if problems:
        lines = [f"  row {index!r}: {why[:300]}" for index, why in problems[:_SHOWN]]
        more = [f"  and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise _invalid("\n".join([f"{len(problems)} of {rows} rows cannot be answered:", *lines, *more]))


def _invalid(text: str) -> MlflowException:
    """MLflow's own error for bad input; its scoring server answers it with status 400."""
    return MlflowException.invalid_parameter_value(text)


def _load_pyfunc(path: str) -> Predictor:
    """MLflow's entry point."""
    return Predictor(path)
