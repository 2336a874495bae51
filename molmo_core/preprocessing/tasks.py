"""Task records: from a record's fields to its raw messages (prompt and answer, no roles, no style prefix).

A record is `{"messages": [...]}` or a task, told apart by its keys:

| keys | task |
|---|---|
| `messages` | a conversation: strings that alternate user, assistant, or {"role", "content"} |
| `question`, `answer` or `answers` (`explanation`) | question answering |
| `question`, `options`, `answer_idx` (`option_names`), or `unlabelled_options` for `options` | multiple choice |
| `label` or `question`, `points` (`point_scale`) | pointing; counting with style `point_count`, `count_then_point` or `count` |
| `label`, `image_points` | pointing in several images: points of each (Molmo2 formats) |
| `label`, `timestamps`, `points` or `tracks` | pointing in a video, tracking: points or {object: point} of each time (Molmo2 formats) |
| `question`, `answer` with `<|POINT|>` slots, `answer_annotations` | answers that point |
| `text` (of a list one is drawn) | captions and transcripts |

A `label` beside a question and its answer is not read: that is question answering.
"""

from __future__ import annotations

import reprlib
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np

from molmo_core.preprocessing import points as point_text
from molmo_core.preprocessing import prompts
from molmo_core.preprocessing.configs import DataFormatter

POINT_SLOT = "<|POINT|>"

_POINT_MODES: dict[str, point_text.PointMode] = {
    "point_count": "point_then_count",
    "point_then_count": "point_then_count",
    "count_then_point": "count_then_point",
    "count": "count",
}
_POINT_TEMPLATES = {"point_then_count": "point_count", "count_then_point": "count_then_point", "count": "count", "point": "pointing"}
POINT_STYLES = frozenset({"pointing", "cosyn_point", *_POINT_MODES})
_OPEN_QA_STYLES = frozenset({"user_qa", "synthetic_qa"})
_CAPTION_KINDS = ("video_short_caption", "video_long_caption", "short_caption", "transcript")
_POINTS = frozenset({"points", "image_points", "tracks"})
_TASK_KEYS = ("messages", "options", "unlabelled_options", "points", "image_points", "tracks", "label", "question", "text")


class TaskReader:
    """Turns records into raw messages.

    Args:
        config: prompt templates, answer selection and point format.
        rng: draws templates, tied answers and images.
        for_inference: records may lack the answer.
        vary: draw prompts; otherwise the first template of each kind is used.
        image_sizes: (width, height) of the images, for points in pixels.
    """

    def __init__(
        self, config: DataFormatter, rng: np.random.RandomState, for_inference: bool, vary: bool, image_sizes: Sequence[tuple[int, int]]
    ):
        self.config, self.rng, self.for_inference, self.vary = config, rng, for_inference, vary
        self.image_sizes = image_sizes
        self.templates = config.prompt_templates != "none"

    def messages(self, record: dict[str, Any], style: str) -> list[str]:
        """Raw messages of a record without null values; without the answer where the record has none (inference only)."""
        check_task(record)
        if "messages" in record:
            return conversation(record["messages"])
        answered = "question" in record and {"answer", "answers"} & record.keys()
        if "options" in record or "unlabelled_options" in record:
            prompt, answer = self._multiple_choice(record)
        elif _POINTS & record.keys() or (("label" in record or style in POINT_STYLES) and not answered):
            prompt, answer = self._pointing(record, style)
        elif "question" in record:
            prompt, answer = self._question(record, style)
        elif "text" in record or self._is_caption(style):
            prompt, answer = self._caption_prompt(style), self._caption(record)
        else:
            raise ValueError(f"no task in a record with the keys {sorted(record)}; expected one of {', '.join(_TASK_KEYS)}")
        if answer is None and not self.for_inference:
            raise ValueError(f"a training record needs an answer; this one has only the keys {sorted(record)}")
        return [prompt] if answer is None else [prompt, answer]

    @staticmethod
    def _is_caption(style: str) -> bool:
        return style.endswith(("caption", "transcript"))

    def _caption_prompt(self, style: str) -> str:
        if not self.templates:
            return ""
        kind = next((k for k in _CAPTION_KINDS if k in style), prompts.CAPTION)
        return prompts.fill(kind, self.rng, self.vary)

    def _caption(self, record: dict[str, Any]) -> str | None:
        """The text of a record; of several any one."""
        text = record.get("text")
        if text is None or isinstance(text, str):
            return text
        return str(text[self.rng.randint(len(text)) if self.vary and len(text) > 1 else 0])

    def _question(self, record: dict[str, Any], style: str) -> tuple[str, str | None]:
        question = _text(record, "question")
        answer = self._answer(record)
        if answer is not None and "answer_annotations" in record:
            answer = self._fill_slots(record, answer)
        if "explanation" in record:
            answer = None if answer is None else f"{_text(record, 'explanation')} Answer: {answer}"
            if self.templates:
                question = prompts.fill("explanation", self.rng, self.vary, question=question)
        elif self.templates and self.vary and style in _OPEN_QA_STYLES and "answer_annotations" not in record:
            question = prompts.without_pointing(question, self.rng)
        return question, answer

    def _answer(self, record: dict[str, Any]) -> str | None:
        """One answer of a record; of several the most frequent (ties at random) or, with `select_answer=first`, the least."""
        values = record.get("answers", record.get("answer"))
        if values is None:
            return None
        if not _is_list(values):
            return str(values)
        values = [str(v) for v in values if str(v).strip()]
        if self.config.select_answer == "first":
            return min(values)
        counts = Counter(values)
        most = max(counts.values())
        best = [v for v, n in counts.items() if n == most]
        return best[0] if len(best) == 1 else best[self.rng.randint(len(best))]

    def _multiple_choice(self, record: dict[str, Any]) -> tuple[str, str | None]:
        question, index = _text(record, "question"), record.get("answer_idx")
        unlabelled = "unlabelled_options" in record
        options = [str(o) for o in record["unlabelled_options" if unlabelled else "options"]]
        index = None if index is None else int(index)
        if unlabelled:
            return "\n".join([question, *options, ""]), None if index is None else options[index]
        names = [str(n) for n in record.get("option_names", string.ascii_uppercase)][: len(options)]
        if len(names) < len(options):
            raise ValueError(f"{len(options)} options, but only {len(names)} option_names")
        if self.config.prompt_templates != "uber_model_v2":
            listed = "\n".join(f"{n}: {o}" for n, o in zip(names, options))
            return f"{question}\n{listed}\n", None if index is None else names[index]
        lettered = [f"{n}. {o}" for n, o in zip(names, options)]
        prompt = prompts.fill("multiple_choice", self.rng, self.vary, question=question, options="\n".join(lettered))
        if index is None:
            return prompt, None
        with_content = self.rng.random_sample() < self.config.p_choice_content_in_mc
        return prompt, lettered[index] if with_content else names[index]

    def _pointing(self, record: dict[str, Any], style: str) -> tuple[str, str | None]:
        mode = _POINT_MODES.get(style, "point")
        label = str(record.get("label", record.get("question", ""))).lower()
        kind, image, answer = _POINT_TEMPLATES[mode], "", None
        if "image_points" in record:
            blocks: list[tuple[float, np.ndarray]] = [
                (i + 1, self._percent(record, p, image=i)) for i, p in enumerate(record["image_points"])
            ]
            kind = "pointing_multi_image"
            if "question" not in record and self.vary and self.rng.random_sample() >= self.config.p_multi_point_all_image:
                blocks = [blocks[self.rng.randint(len(blocks))]]
                kind, image = "pointing_one_of_images", str(blocks[0][0])
            answer = self._blocks(blocks, label, mode)
        elif "tracks" in record:
            kind, answer = "tracking", self._tracks(record, label)
        elif "points" in record and "timestamps" in record:
            kind = "video_pointing" if mode == "point" else kind
            blocks = [(float(t), self._percent(record, p)) for t, p in zip(record["timestamps"], record["points"], strict=True)]
            answer = self._blocks(blocks, label, mode)
        elif "points" in record:
            points = self._percent(record, record["points"])
            answer = point_text.answer_text(self._tag(points, label), len(points), mode)
        if "question" in record:
            return _text(record, "question"), answer
        if not label:
            raise ValueError(f"a pointing record needs a label or a question; this one has the keys {sorted(record)}")
        return (prompts.fill(kind, self.rng, self.vary, label=label, image=image) if self.templates else label), answer

    def _blocks(self, blocks: Sequence[tuple[float, np.ndarray]], label: str, mode: point_text.PointMode) -> str:
        """Points of several images or times."""
        tag = point_text.format_html(blocks, label, self._html_version())
        return point_text.answer_text(tag, sum(len(points) for _, points in blocks), mode)

    def _tag(self, points: np.ndarray, label: str, alt: str | None = None) -> str:
        """Points of one image."""
        if self.config.pointing_format == "v1":
            return point_text.format_v1(points, label, alt)
        return point_text.format_html([(1, points)], label, self.config.pointing_format, alt)

    def _tracks(self, record: dict[str, Any], label: str) -> str:
        """`tracks`: for each of `timestamps` a dict {object: (x, y) or None}."""
        frames = [
            (float(t), {name: None if xy is None else self._percent(record, [xy])[0] for name, xy in objects.items()})
            for t, objects in zip(record["timestamps"], record["tracks"], strict=True)
        ]
        return point_text.format_tracks(frames, label, self._html_version())

    def _html_version(self) -> Literal["html-v1", "html-v2"]:
        if self.config.pointing_format == "v1":
            raise ValueError("points of several images or times need data_formatter.pointing_format html-v1 or html-v2")
        return self.config.pointing_format

    def _fill_slots(self, record: dict[str, Any], answer: str) -> str:
        """Puts the tags of `answer_annotations` ({points, label, alt}) into the slots of an answer, in order."""
        annotations = record["answer_annotations"]
        first, *parts = answer.split(POINT_SLOT)
        if len(parts) != len(annotations):
            raise ValueError(f"the answer has {len(parts)} {POINT_SLOT} slots, but answer_annotations has {len(annotations)} entries")
        tags = [self._tag(self._percent(record, a["points"]), str(a["label"]), a.get("alt")) for a in annotations]
        return first + "".join(tag + part for tag, part in zip(tags, parts))

    def _percent(self, record: dict[str, Any], points: Iterable[Sequence[float]], image: int = 0) -> np.ndarray:
        """A record's points in percent: `point_scale` is the largest coordinate; without it they are pixels of the image."""
        size = self.image_sizes[image] if image < len(self.image_sizes) else None
        return point_text.percent(points, record.get("point_scale"), size)


_HUGE = 1e300  # JSON has whole numbers that no float holds


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple | np.ndarray)


def _is_number(value: Any) -> bool:
    real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return bool(real and -_HUGE < value < _HUGE)  # not so: NaN and infinities


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | bool | np.bool_) or _is_number(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_answer(value: Any) -> bool:
    if _is_list(value):
        return all(map(_is_scalar, value)) and any(str(v).strip() for v in value)
    return _is_scalar(value) and bool(str(value).strip())


def _list_of(fits: Callable[[Any], bool], least: int = 0) -> Callable[[Any], bool]:
    return lambda value: _is_list(value) and len(value) >= least and all(map(fits, value))


def _is_pair(value: Any) -> bool:
    return _is_list(value) and len(value) == 2 and all(map(_is_number, value))


_is_points = _list_of(_is_pair)
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("style", "question", "explanation"), (lambda v: isinstance(v, str), "a string")),
    **dict.fromkeys(("label", "count"), (_is_scalar, "a string or a number")),
    "text": (lambda v: _is_text(v) or _list_of(_is_text, 1)(v), "a string that is not empty, or a non-empty list of them"),
    **dict.fromkeys(("answer", "answers"), (_is_answer, "a string that is not empty, a number, or a non-empty list of them")),
    **dict.fromkeys(("options", "unlabelled_options", "option_names"), (_list_of(_is_scalar, 1), "a non-empty list of strings")),
    "answer_idx": (lambda v: _is_number(v) and v == int(v), "the number of an option, from 0"),
    "answer_annotations": (
        _list_of(lambda a: isinstance(a, dict) and "label" in a and _is_points(a.get("points"))),
        "a list of {points: [[x, y], ...], label}",
    ),
    "points": (lambda v: _is_points(v) or _list_of(_is_points)(v), "a list of [x, y], with timestamps one of such lists"),
    "image_points": (_list_of(_is_points), "a list of [x, y] for each image"),
    "timestamps": (_list_of(_is_number), "a list of seconds"),
    "tracks": (
        _list_of(lambda t: isinstance(t, dict) and all(xy is None or _is_pair(xy) for xy in t.values())),
        "a list of {object: [x, y]}, one for each of timestamps",
    ),
    "point_scale": (lambda v: _is_number(v) and v > 0, "a number above 0"),
    "weight": (lambda v: _is_number(v) and v >= 0, "a number, 0 or more"),
    "message_weight": (lambda v: isinstance(v, dict), "an object"),
}


def check_task(record: dict[str, Any], where: str = "") -> None:
    """Checks the values of a task's fields, as far as that takes no image.

    Args:
        record: nulls are fields that are not there.
        where: stands before the field in errors (`message_list[3].`).

    Raises:
        ValueError: names the field and what was found.
    """
    given = {field: value for field, value in record.items() if value is not None}
    for field, (fits, wanted) in _FIELDS.items():
        if field in given and not fits(given[field]):
            raise ValueError(f"{where}{field} must be {wanted}, got {reprlib.repr(given[field])}")
    options = given.get("unlabelled_options", given.get("options"))
    if options is not None and "answer_idx" in given and not 0 <= given["answer_idx"] < len(options):
        raise ValueError(f"{where}answer_idx={given['answer_idx']} is none of the {len(options)} options")
    for field in ("points", "tracks"):
        if field in given and "timestamps" in given and len(given[field]) != len(given["timestamps"]):
            raise ValueError(f"{where}{field} has {len(given[field])} entries, timestamps has {len(given['timestamps'])}")
    if "tracks" in given and "timestamps" not in given:
        raise ValueError(f"{where}tracks need timestamps")
    if "messages" in given:
        try:
            conversation(given["messages"])
        except ValueError as error:
            raise ValueError(f"{where}{error}") from None


def conversation(messages: Sequence[str | dict[str, Any]]) -> list[str]:
    """Texts of messages that alternate user, assistant.

    Args:
        messages: strings, or {"role": "user" | "assistant", "content": str}.

    Raises:
        ValueError: no messages, a role out of turn, or content that is no text.
    """
    if not _is_list(messages) or len(messages) == 0:
        raise ValueError(f"messages is a list of at least one message, got {messages!r}")
    texts = []
    for i, message in enumerate(messages):
        expected = "assistant" if i % 2 else "user"
        if isinstance(message, dict):
            if message.get("role") != expected:
                raise ValueError(
                    f"messages[{i}] has the role {message.get('role')!r}; roles alternate user, assistant, so it must be {expected!r}"
                )
            message = message.get("content")  # type: ignore[assignment]
        if not isinstance(message, str):
            raise ValueError(f"messages[{i}] is {type(message).__name__}; a message is a string or {{'role', 'content': string}}")
        texts.append(message)
    return texts


def _text(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{key} must be a string, got {value!r}")
    return value
