"""Task records: from a record's fields to its raw messages (prompt and answer, no roles, no style prefix).

A record is `{"messages": [...]}` or a task, told apart by its keys:

| keys | task |
|---|---|
| `messages` | a conversation: strings that alternate user, assistant, or {"role", "content"} |
| `question`, `answer` or `answers` (`explanation`) | question answering |
| `question`, `options`, `answer_idx` (`option_names`), or `unlabelled_options` for `options` | multiple choice |
| `label` or `question`, `points` (`point_scale`) | pointing; with style `point_count`, `count_then_point` or `count` counting |
| `label`, `image_points` | pointing in several images: points of each (Molmo2 formats) |
| `label`, `timestamps`, `points` or `tracks` | pointing in a video, tracking: points or {object: point} of each time (Molmo2 formats) |
| the same, one object, style `video_single_point_track_per_frame` | the question gives one point of the track, the answer is the rest |
| `question`, `answer` with `<|POINT|>` slots, `answer_annotations` | answers that point |
| `text` (of a list one is drawn) | captions and transcripts |

A `label` beside a question and its answer is not read: that is question answering.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from molmo_core.preprocessing import points as point_text
from molmo_core.preprocessing import prompts
from molmo_core.preprocessing.configs import DataFormatter
from molmo_core.preprocessing.given_points import STYLE, GivenPoint, after, given_point
from molmo_core.preprocessing.point_tokens import PointWriter
from molmo_core.preprocessing.task_fields import check_task, conversation, is_list, task_kind

POINT_SLOT = "<|POINT|>"

_POINT_MODES: dict[str, point_text.PointMode] = {
    "point_count": "point_then_count",
    "point_then_count": "point_then_count",
    "count_then_point": "count_then_point",
    "count_point": "count_then_point",
    "count": "count",
}
_POINT_TEMPLATES = {"point_then_count": "point_count", "count_then_point": "count_then_point", "count": "count", "point": "pointing"}
_OPEN_QA_STYLES = frozenset({"user_qa", "synthetic_qa"})
_CAPTION_KINDS = ("video_short_caption", "video_long_caption", "short_caption", "transcript")
_ANSWERS = {
    "multiple choice": "answer_idx",
    "pointing": "points, image_points or tracks",
    "question": "answer or answers",
    "caption": "text",
}
_TASK_KEYS = ("messages", "options", "unlabelled_options", "points", "image_points", "tracks", "label", "question", "text")


class TaskReader:
    """Turns records into raw messages.

    Args:
        config: prompt templates, answer selection and point format.
        rng: draws templates, tied answers and images.
        for_inference: records may lack the answer.
        vary: draw prompts; otherwise the first template of each kind is used.
        image_sizes: (width, height) of the images, for points in pixels.
        points: writes points as tokens; None: as `config.pointing_format`.
    """

    def __init__(
        self,
        config: DataFormatter,
        rng: np.random.RandomState,
        for_inference: bool,
        vary: bool,
        image_sizes: Sequence[tuple[int, int]],
        points: PointWriter | None = None,
    ):
        self.config, self.rng, self.for_inference, self.vary = config, rng, for_inference, vary
        self.image_sizes, self.points = image_sizes, points
        self.templates = config.prompt_templates != "none"

    def messages(self, record: dict[str, Any], style: str) -> list[str]:
        """Raw messages of a record without null values; without the answer where the record has none (inference only)."""
        check_task(record)
        kind = task_kind(record, style)
        if kind == "conversation":
            texts = conversation(record["messages"])
            return [self._as_tokens(text) if i % 2 else text for i, text in enumerate(texts)]
        if kind == "multiple choice":
            prompt, answer = self._multiple_choice(record)
        elif kind == "pointing":
            prompt, answer = self._pointing(record, style)
        elif kind == "question":
            prompt, answer = self._question(record, style)
        elif kind == "caption":
            prompt, answer = self._caption_prompt(style), self._caption(record)
        else:
            raise ValueError(f"no task in a record with the keys {sorted(record)}; expected one of {', '.join(_TASK_KEYS)}")
        if answer is None and not self.for_inference:
            raise ValueError(f"a training record needs an answer ({_ANSWERS[kind]}); this {kind} record has only the keys {sorted(record)}")
        return [prompt] if answer is None else [prompt, answer]

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
        elif answer is not None:
            answer = self._as_tokens(answer)
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
        if not is_list(values):
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
        mode = _POINT_MODES.get(style.removeprefix("video_").removeprefix("multi_image_"), "point")
        label = str(record.get("label", record.get("question", ""))).lower()
        kind, image, given, answer = _POINT_TEMPLATES[mode], "", "", None
        if "image_points" in record:
            blocks: list[tuple[float, np.ndarray]] = [
                (i + 1, self._percent(record, p, image=i)) for i, p in enumerate(record["image_points"])
            ]
            kind = "pointing_multi_image"
            if "question" not in record and self.vary and self.rng.random_sample() >= self.config.p_multi_point_all_image:
                blocks = [blocks[self.rng.randint(len(blocks))]]
                kind, image = "pointing_one_of_images", str(blocks[0][0])
            answer = self._blocks(blocks, label, mode)
        elif "tracks" in record and STYLE in style:
            point = given_point(record, self.rng if self.vary else None)
            kind, given = "tracking_a_point", self._given(record, point, label)
            answer = self._tracks(after(point, record), label)
        elif "tracks" in record:
            kind, answer = "tracking", self._tracks(record, label)
        elif "points" in record and "timestamps" in record:
            kind = "video_pointing" if mode == "point" else kind
            blocks = [(float(t), self._percent(record, p)) for t, p in zip(record["timestamps"], record["points"], strict=True)]
            answer = self._blocks(blocks, label, mode)
        elif "points" in record:
            points = self._percent(record, record["points"])
            count = len(points) if self.points is None else self.points.count([(1, points)])
            answer = str(count) if mode == "count" else point_text.answer_text(self._tag(points, label), count, mode)
        if "question" in record:
            return _text(record, "question"), answer
        if not label:
            raise ValueError(f"a pointing record needs a label or a question; this one has the keys {sorted(record)}")
        if not self.templates:
            return given or label, answer
        return prompts.fill(kind, self.rng, self.vary, label=label, image=image, point=given), answer

    def _blocks(self, blocks: Sequence[tuple[float, np.ndarray]], label: str, mode: point_text.PointMode) -> str:
        """Points of several images or times."""
        count = sum(len(points) for _, points in blocks) if self.points is None else self.points.count(blocks)
        if mode == "count":
            return str(count)
        if self.points is not None:
            return point_text.answer_text(self.points.points(blocks, label), count, mode)
        return point_text.answer_text(point_text.format_html(blocks, label, self._html_version()), count, mode)

    def _tag(self, points: np.ndarray, label: str, alt: str | None = None) -> str:
        """Points of one image."""
        if self.points is not None:
            return self.points.points([(1, points)], label)
        if self.config.pointing_format == "v1":
            return point_text.format_v1(points, label, alt)
        return point_text.format_html([(1, points)], label, self._html_version(), alt)

    def _tracks(self, record: dict[str, Any], label: str) -> str:
        """`tracks`: for each of `timestamps` a dict {object: (x, y) or None}."""
        frames = [
            (float(t), {name: None if xy is None else self._percent(record, [xy])[0] for name, xy in objects.items()})
            for t, objects in zip(record["timestamps"], record["tracks"], strict=True)
        ]
        if self.points is not None:
            return self.points.tracks(frames, label)
        return point_text.format_tracks(frames, label, self._html_version())

    def _as_tokens(self, answer: str) -> str:
        """Points that an answer writes as text are tokens for a model that has them, also in turns before the one that is asked for."""
        return answer if self.points is None else self.points.rewritten(answer, leave=self.for_inference)

    def _given(self, record: dict[str, Any], point: GivenPoint, label: str) -> str:
        """The point of a question: text for every model, tokens of points stand in answers only."""
        size = self.image_sizes[0] if self.image_sizes else None
        xy = point_text.percent([point.xy], record.get("point_scale"), size)
        return point_text.format_html([(point.seconds, xy)], label, "html-v2")

    def _html_version(self) -> Literal["html-v1", "html-v2"]:
        if self.config.pointing_format == "tokens":
            raise ValueError("points need an image or a video to point at; this record has neither")
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
        """A record's points in percent (as shares for `points`): `point_scale` is the largest coordinate; without it they are pixels of
        the image."""
        size = self.image_sizes[image] if image < len(self.image_sizes) else None
        convert = point_text.percent if self.points is None else point_text.shares
        return convert(points, record.get("point_scale"), size)


def _text(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{key} must be a string, got {value!r}")
    return value
