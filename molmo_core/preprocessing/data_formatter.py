"""From a record to the conversations that are tokenised: style prefixes and the roles of the chat around the task's messages.

The records themselves are described in `tasks`. `style` names the data set or task, `weight` multiplies the loss (of a
record, an annotation, or an assistant's message), `message_weight` overrides the weighting rules, `message_list` makes a message tree,
`placeholders: False` says that `<|image|>` and `<|video|>` in its texts are text too, and not the places of media.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from molmo_core.preprocessing.configs import DataFormatter
from molmo_core.preprocessing.messages import Annotation, MessageWeight
from molmo_core.preprocessing.point_tokens import MARKS, PointWriter
from molmo_core.preprocessing.task_fields import POINT_STYLES
from molmo_core.preprocessing.tasks import TaskReader
from molmo_core.tokens import IMAGE_PROMPT

DEMO_STYLES = frozenset({
    "point_count", "pointing", "user_qa", "long_caption", "cosyn_point", "short_caption", "video_long_caption", "video_short_caption",
    "correction_qa",
})  # fmt: skip
"""Styles of what users ask a demo: `demo_or_style` leaves their prefix out nine times of ten."""

_ALWAYS_PLAIN = frozenset({"demo", "android_control"})
_PLAIN_STYLES_V2 = DEMO_STYLES | POINT_STYLES | {
    "demo", "tracking", "text_sft", "video_point", "video_point_count", "video_count", "video_count_point", "video_point_track_per_frame",
    "video_point_track_start_end", "video_point_track_all_frames", "video_single_point_track_start_end", "video_transcript",
    "video_clip_caption_start_end", "video_clip_caption_start_end_in_seconds", "video_clip_transcript_start_end",
    "video_clip_transcript_start_end_in_seconds", "video_frame_caption_timestamp", "video_frame_caption_timestamp_in_seconds",
    "multi_image_pointing", "multi_image_counting", "multi_image_point_then_count", "multi_image_count_then_point",
    "video_multiple_choice", "video_multiple_choice_count_without_pointing", "video_multiple_choice_multiple_correct",
    "video_multiple_choice_w_subtitle", "a_okvqa_mc", "ai2_diagram", "ai2_diagram_no_letter", "science_qa", "multi_image_mc",
    "multi_image_mc_exp", "mantis_instruct_mc",
}  # fmt: skip
"""`demo_or_style_v2` leaves out the prefix of these, always: what users ask, and multiple choice; other styles have theirs, always.
(The published code has one for `demo`, too; here that is the style of questions of one's own, which are trained as they will be asked.)"""
_POINT_STYLES_V2 = POINT_STYLES | {"text_sft", "video_point", "video_point_count", "video_count", "video_count_point"}
"""Of MolmoPoint: the length of their answers is not asked for."""
_EVAL_STYLES = {
    "eval_short_answer": "vqa2",
    "eval_multiple_choice": "a_okvqa_mc",
    "video_eval_short_answer": "llava_video_da",
    "video_eval_multiple_choice": "llava_video_mc",
}
_EVAL_STYLES_V2 = {**_EVAL_STYLES, "video_eval_short_answer": "video_short_answer", "video_eval_multiple_choice": "video_multiple_choice"}


class Formatter:
    """Formats records as a `DataFormatter` configuration says. Stateless; all randomness comes from the `rng` it is given.

    Args:
        literal: what keeps names of special tokens in the text of a record text (`Tokenizer.literal`); None = they are left as they are.
    """

    def __init__(self, config: DataFormatter, literal: Callable[[str, bool], str] | None = None):
        self.config = config
        self.literal = literal
        self.html = config.pointing_format != "v1"

    def __call__(
        self,
        example: dict[str, Any],
        rng: np.random.RandomState,
        *,
        for_inference: bool = False,
        is_training: bool = False,
        image_sizes: Sequence[tuple[int, int]] = (),
        points: PointWriter | None = None,
    ) -> list[Annotation]:
        """The conversations of a record, ready to be tokenised.

        Args:
            example: a record (see the module).
            rng: draws templates, styles, tied answers and the order of a message tree.
            for_inference: leave the answer out. `messages` stay as they are: a final assistant message is continued.
            is_training: vary the prompts; otherwise the first template of each kind is used.
            image_sizes: (width, height) of the images, for points in pixels.
            points: writes points as tokens (MolmoPoint); None: as the configuration's `pointing_format`.

        Returns:
            One annotation, or the several of a message tree in random order.

        Raises:
            ValueError: a record without a known task, or with a value that does not fit; the message names the key.
        """
        records = example.get("message_list")
        if records is not None and len(records) == 0:
            raise ValueError("message_list is empty: a message tree needs at least one annotation")
        reader = TaskReader(self.config, rng, for_inference, is_training and not for_inference, image_sizes, points)
        annotations = [self._annotation(r, example, reader) for r in ([example] if records is None else records)]
        if records is not None:
            rng.shuffle(annotations)  # type: ignore[arg-type]
        return annotations

    def _annotation(self, record: dict[str, Any], example: dict[str, Any], reader: TaskReader) -> Annotation:
        own = record is not example
        record = {k: v for k, v in record.items() if v is not None}  # tables have a null where a record lacks a key
        style = record.get("style") or example.get("style")
        messages = reader.messages(record, style or "")
        if style is not None:
            answer = messages[1] if len(messages) > 1 else None
            prefix = self._style_prefix(style, answer, reader)
            messages[0] = " ".join(part for part in (prefix, messages[0]) if part)
        if reader.for_inference and "messages" not in record:
            messages = messages[:1]
        if self.literal is not None:
            messages = [self.literal(message, not example.get("placeholders", True)) for message in messages]
        if self.config.image_last and reader.image_sizes:
            messages[0] += IMAGE_PROMPT
        points = None if reader.points is None else reader.points.taken()
        if points is not None and any("".join(messages).count(mark) != (points[:, i] >= 0).sum() for i, mark in enumerate(MARKS)):
            if len(messages) > 1:
                raise ValueError("the text of a record with points holds characters that Unicode reserves for use inside a program")
            points = None
        return Annotation(self._with_roles(messages), _weight(record, example if own else {}), _turn_weights(record), points)

    def _with_roles(self, messages: list[str]) -> list[str]:
        """Adds the roles of the message format; every message but the first is set off by a space or a turn token."""
        kind = self.config.message_format
        if kind == "qwen3":
            turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
            return [m if i % 2 else ("<|im_end|>\n" if i else "") + turn.replace("{}", m) for i, m in enumerate(messages)]
        if kind == "role":
            messages = [m if i % 2 else f"User: {m} Assistant:" for i, m in enumerate(messages)]
        return [" " + m if i or self.config.always_start_with_space else m for i, m in enumerate(messages)]

    def _style_prefix(self, style: str, answer: str | None, reader: TaskReader) -> str:
        """The text before the first user message that tells the model what kind of answer is wanted."""
        kind, rng = self.config.system_prompt, reader.rng
        v2 = kind == "demo_or_style_v2" or self.html
        style = (_EVAL_STYLES_V2 if v2 else _EVAL_STYLES).get(style, style)
        if v2 and style.startswith("eval_multi_image_"):
            style = style.removeprefix("eval_")
        if kind in (None, "none", "no_style"):
            return ""
        if kind == "style":
            return f"{style}:"
        if kind == "demo_or_style":
            plain = style in _ALWAYS_PLAIN or (style in DEMO_STYLES and rng.random_sample() > 0.1)
            return "" if plain else f"{style}:"
        if kind == "demo_or_style_v2":
            return "" if style in _PLAIN_STYLES_V2 else f"{style}:"
        return self._style_and_length(kind, style, answer, reader)

    def _style_and_length(self, kind: str, style: str, answer: str | None, reader: TaskReader) -> str:
        if style in (_POINT_STYLES_V2 if self.config.pointing_format == "tokens" else POINT_STYLES if self.html else ()):
            return f"{style}:"
        if reader.for_inference or answer is None:
            length = self.config.default_inference_len
        elif kind == "style_and_length_v3":
            length = int(len(answer) * np.clip(reader.rng.normal(1.0, 0.05), 0.5, 1.5) / 25)
        elif reader.rng.random_sample() > 0.1:
            length = (len(answer) + int(reader.rng.normal(scale=25))) // 15
        else:
            length = None
        if length is not None:
            return f"{style} {length}:"
        return f"{style} :" if kind == "style_and_length" else f"{style}:"


def _turn_weights(record: dict[str, Any]) -> list[float] | None:
    """`weight` of each message, if any has one."""
    turns = record.get("messages", ())
    if not any(isinstance(turn, dict) and turn.get("weight") is not None for turn in turns):
        return None
    return [1.0 if isinstance(turn, str) or turn.get("weight") is None else float(turn["weight"]) for turn in turns]


def _weight(record: dict[str, Any], example: dict[str, Any]) -> MessageWeight:
    """`message_weight` and `weight` of an annotation; the `weight` of its example multiplies it."""
    settings = record.get("message_weight") or example.get("message_weight") or {}
    unknown = settings.keys() - {"weight", "root_subsegments", "root_length"}
    if unknown:
        raise ValueError(f"message_weight has the keys weight, root_subsegments and root_length; got {sorted(unknown)}")
    scale = 1.0 if example.get("weight") is None else example["weight"]
    return MessageWeight(**{**settings, "weight": float(settings.get("weight", 1.0) * record.get("weight", 1.0) * scale)})
