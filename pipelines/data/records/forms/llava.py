"""LLaVA records: `conversations` of {"from", "value"}; `<image>` or `<video>` marks the places of the media."""

from __future__ import annotations

from collections import Counter
from typing import Any

from molmo_core.preprocessing.task_fields import COMMON_FIELDS
from pipelines.data.records.fields import Fields
from pipelines.data.records.forms.turns import read_system, read_turns
from pipelines.data.records.row_media import Inline


def fits(row: Fields) -> bool:
    """Whether a row is of this form."""
    return "conversations" in row


def read(row: Fields, inline: Inline, counts: Counter[str]) -> dict[str, Any]:
    """`messages`, and the settings beside them."""
    turns = read_turns(row.take("conversations"), "conversations", inline, counts, read_system(row), strip=True)
    return {"messages": turns, **row.take_all(*COMMON_FIELDS)}
