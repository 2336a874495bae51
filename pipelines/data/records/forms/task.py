"""Single tasks: a question, options, points, a caption; the fields are those of `molmo_core.preprocessing.task_fields`."""

from __future__ import annotations

from collections import Counter
from typing import Any

from molmo_core.preprocessing.task_fields import COMMON_FIELDS, READ_FIELDS, check_task, task_kind
from pipelines.data.records import unread
from pipelines.data.records.fields import Fields, text, whole_number
from pipelines.data.records.forms.choices import read_choices
from pipelines.data.records.forms.points import read_points
from pipelines.data.records.forms.turns import read_system
from pipelines.data.records.row_media import Inline
from pipelines.data.rejects import Rejected

_ALL = frozenset().union(*READ_FIELDS.values())
_STYLES = {"question": "demo", "multiple choice": "demo", "pointing": "pointing"}


def fits(row: Fields) -> bool:
    """Whether a row is of this form: the last one that is tried."""
    return True


def read(row: Fields, inline: Inline, counts: Counter[str], style: Any = None) -> dict[str, Any]:
    """The fields that the task's kind reads.

    Args:
        style: of the row around it, for a task that has none.

    Raises:
        Rejected: no task, or a value that does not fit.
    """
    task = row.take_all(*COMMON_FIELDS)
    own_style = task.get("style")
    if "caption" in row and not {"question", "text", "options", "choices", "points", "label"} & row.left.keys():
        task |= {"style": own_style or "long_caption", "text": text(row.take("caption"), f"{row.where}caption")}
    task |= read_choices(row)
    if "points" in row and "timestamps" not in row:
        task |= read_points(row.take("points"), row, counts)
        if "count" in row and whole_number(row.take("count"), f"{row.where}count") != len(task["points"]):
            raise Rejected("record: bad points", f"{row.where}count is not the number of points, {len(task['points'])}")
    elif "question" in row and "count" in row and not {"answer", "answers", "points"} & row.left.keys() and "options" not in task:
        task["answer"] = str(whole_number(row.take("count"), f"{row.where}count"))
    named = str(task.get("style") or style or "")
    kind = task_kind(task | row.left, named)
    if kind is None:
        raise Rejected("record: no text", f"none of messages, conversations, question, caption, message_list; fields: {sorted(row.left)}")
    task |= row.take_all(*(READ_FIELDS[kind] & _ALL))
    if "answer_annotations" in task:
        _check_annotations(task["answer_annotations"], f"{row.where}answer_annotations", counts)
    if system := read_system(row):
        if "question" not in task:
            raise Rejected("record: bad field", f"{row.where}system: this {kind} record has no question that it could join")
        task["question"] = f"{system}\n{task['question']}"
    if kind in ("question", "multiple choice") and "label" in row:  # of a data set for classification; the question says what is asked
        row.take("label")
        unread.count(row, "label", counts)
    if "style" not in task and style is None:
        if kind == "caption":
            raise Rejected("record: bad field", f"{row.where}text is a caption's or a transcript's: write its style, or caption for text")
        if kind == "pointing" and "question" not in task and not {"points", "image_points", "tracks"} & task.keys():
            raise Rejected("record: no answer", f"{row.where}label needs points, or a count; fields: {sorted([*task, *row.left])}")
        task["style"] = _STYLES[kind]
    return checked(task, row.where)


def checked(task: dict[str, Any], where: str = "") -> dict[str, Any]:
    """A task whose values fit; the number of an option whole."""
    try:
        check_task(task, where)
    except ValueError as error:
        raise Rejected("record: bad field", str(error)) from None
    return task | {"answer_idx": int(task["answer_idx"])} if "answer_idx" in task else task


def _check_annotations(annotations: Any, where: str, counts: Counter[str]) -> None:
    for i, annotation in enumerate(annotations if isinstance(annotations, list) else ()):
        if isinstance(annotation, dict):
            given = Fields(annotation, f"{where}[{i}].")
            given.take_all("points", "label", "alt")
            unread.judge(given, counts, inside=True)
