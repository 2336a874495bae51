"""Rows that are not records, made into records."""

import json

import numpy as np
import pytest

from molmo_core.config import ConfigError
from pipelines.data.rejects import Rejected
from pipelines.data.sources import open_records
from pipelines.evaluation.columns import check_fields, mapped, record_of
from pipelines.evaluation.config import EvaluateConfig

ROW = {
    "q": "why?",
    "meta": {"a": "so"},
    "said": [{"text": "x"}, {"text": "y"}],
    "n": "3",
    "id": 7,
    "o": "['a', 'b']",
    "l": ["A. red", "(B) blue"],
    "nothing": None,
}


def made(**fields) -> dict:
    check_fields(fields)
    record = record_of(ROW, fields, "s3://bucket/part.one.jsonl")
    return {**{k: v for k, v in record.items() if k not in ("message_list", "metadata")}, **record["message_list"][0]}


@pytest.mark.parametrize(
    ("made_of", "value"),
    [
        ("q", "why?"),
        ("meta.a", "so"),
        ("said[].text", ["x", "y"]),
        ("n!int", 3),
        ("o!list", ["a", "b"]),
        ("l!unlettered", ["red", "blue"]),
        ("=a_style", "a_style"),
        ("videos/{source}/{id}.mp4", "videos/part/7.mp4"),
        (["q", "nothing", "n"], ["why?", "3"]),
    ],
)
def test_what_a_field_is_made_of(made_of, value):
    assert made(answer=made_of) == {"answer": value}


def test_null_is_a_field_that_is_not_there():
    assert made(answer="nothing", options="no.column", text="q.b", images=["nothing"], image="q") == {"image": "why?"}


def test_media_one_annotation_and_what_the_model_does_not_see():
    fields = {"image": "q", "question": "q", "truth.category": "n", "truth.masks": "m!masks"}
    record = record_of({**ROW, "m": [[[0, 1]]]}, fields, "a.json")
    assert record["image"] == "why?"
    assert record["message_list"] == [{"question": "why?"}]
    assert record["metadata"]["truth"]["category"] == "3"
    np.testing.assert_array_equal(record["metadata"]["truth"]["masks"], [[[False, True]]])


@pytest.mark.parametrize(
    ("made_of", "reason"),
    [
        ("q[]", "q is not a list"),
        ("q!int", "q is not what int converts: 'why"),
        ("q!list", "q is not what list converts"),
        ("{p}.mp4", "fields.answer: there is no p among source, q, meta"),
    ],
)
def test_rows_that_do_not_fit_are_rejected(made_of, reason):
    with pytest.raises(Rejected, match=reason):
        record_of(ROW, {"answer": made_of}, "a.json")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"anwser": "q"}, r"fields\.anwser: records have image"),
        ({"answer": "a..b"}, "is not a column"),
        ({"answer": "q!float"}, "no conversion is called 'float'; there are int"),
        ({"images": ["q", "{"]}, "fields.images: '{'"),
    ],
)
def test_what_is_not_a_mapping(fields, reason):
    with pytest.raises(ConfigError, match=reason):
        EvaluateConfig(model="m", records="r", output="o", fields=fields)


def test_records_keep_their_numbers(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"q": str(i)}) for i in range(4)))
    records = open_records(str(path)).part(np.array([1, 3]))
    changed = mapped(records, {"question": "q"})
    assert len(changed) == 2
    assert changed[1].data["message_list"] == [{"question": "3"}]
    assert changed.text(0).data["message_list"] == [{"question": "1"}]
    assert (changed.where(1), changed.stamp) == (records.where(1), records.stamp)
    assert mapped(records, {}) is records
