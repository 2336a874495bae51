"""Questions and scores of every kind of record."""

import pyarrow as pa
import pytest

from molmo_core.config import ConfigError
from pipelines.data.rejects import Rejected
from pipelines.evaluation.config import EvaluateConfig
from pipelines.evaluation.picture import spread
from pipelines.evaluation.questions import judge, media_of, questions
from pipelines.evaluation.report import Tally, summarise
from pipelines.evaluation.results import SCHEMA

CONFIG = EvaluateConfig(model="m", records="r", output="o")
SIZE = (200, 100)


def scored(task: dict, prediction: str, **settings) -> float:
    config = EvaluateConfig(model="m", records="r", output="o", **settings)
    return judge(questions(task)[0], config, [SIZE]).score(prediction)


def test_message_tree():
    example = {
        "image": "a.png",
        "style": "demo",
        "message_list": [{"question": "what?", "answer": "red", "type": "colour"}, {"question": "where?", "answer": "here", "style": "x"}],
        "metadata": {"id": 1},
    }
    first, second = questions(example)
    assert (first.text, first.answers, first.type) == ("what?", ["red"], "colour")
    assert second.type == "x"
    assert first.task == {"style": "demo", "question": "what?", "answer": "red", "type": "colour"}
    assert media_of(example) == {"image": "a.png"}


def test_chat_keeps_what_comes_before_the_last_answer():
    messages = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd")]
    (question,) = questions({"messages": messages})
    assert question.task["messages"] == messages[:3]
    assert (question.text, question.answers) == ("c", ["d"])
    with pytest.raises(Rejected, match="assistant"):
        questions({"messages": messages[:3]})


@pytest.mark.parametrize(
    ("task", "answers"),
    [
        ({"question": "q", "answers": ["a", "b"]}, ["a", "b"]),
        ({"question": "q", "options": ["x", "y"], "answer_idx": 1}, ["y"]),
        ({"label": "dogs", "points": [[1, 2], [3, 4]], "point_scale": 100}, ["2"]),
        ({"label": "dogs", "count": 3}, ["3"]),
        ({"style": "long_caption", "text": "A dog."}, ["A dog."]),
        ({"question": "q", "answer": 7}, ["7"]),
    ],
)
def test_reference_answers(task, answers):
    assert questions(task)[0].answers == answers


def test_no_answer_is_rejected():
    with pytest.raises(Rejected, match="no answer"):
        questions({"question": "q"})
    with pytest.raises(Rejected, match="record: no question"):
        questions({"image": "a.png", "message_list": []})


@pytest.mark.parametrize(
    ("task", "settings", "told"),
    [
        ({"question": "q", "answer": "a"}, {"metric": "multiple_choice"}, "multiple_choice needs options"),
        ({"question": "how many?", "answer": "some"}, {"metric": "count"}, "count needs count"),
        ({"style": "pointing", "label": "a", "points": [[300, 50]]}, {}, "point outside the image"),
    ],
)
def test_what_a_metric_cannot_use_is_rejected(task, settings, told):
    with pytest.raises(Rejected, match=f"record: no answer: .*{told}"):
        scored(task, "a", **settings)


@pytest.mark.parametrize(
    ("task", "prediction", "settings", "expected"),
    [
        ({"question": "q", "answer": "two"}, "2", {}, 1),
        ({"question": "q", "answer": "two"}, "2", {"metric": "exact_match"}, 0),
        ({"question": "q", "answer": "100"}, "104", {"metric": "relaxed_accuracy"}, 1),
        ({"question": "q", "answer": "hello"}, "Answer: hallo", {"metric": "anls"}, 0.8),
        ({"style": "point_count", "label": "dogs", "points": [[1, 1]] * 3, "point_scale": 100}, "shows a total of 3", {}, 1),
        ({"question": "q", "options": ["red", "blue"], "answer_idx": 1}, "B", {"metric": "multiple_choice"}, 1),
        ({"question": "q", "options": ["red", "blue"], "answer_idx": 1}, "B. blue", {"metric": "multiple_choice"}, 1),
        ({"question": "q", "options": ["red", "blue"], "answer_idx": 1}, "blue", {"metric": "multiple_choice"}, 1),
        ({"question": "q", "options": ["red", "blue"], "answer_idx": 1}, "A", {"metric": "multiple_choice"}, 0),
        ({"question": "q", "unlabelled_options": ["a", "b"], "answer_idx": 0}, "b", {"metric": "multiple_choice"}, 0),
    ],
)
def test_scores(task, prediction, settings, expected):
    assert scored(task, prediction, **settings) == pytest.approx(expected)


def test_pointing_is_within_a_share_of_the_width():
    """Truth at (100, 50) of a 200 x 100 picture; the radius is 5 % of the width, 10 pixels, in both directions."""
    written = {"question": "Point.", "answer": '<point x="50.0" y="50.0" alt="a">a</point>', "type": "pointing"}
    numbers = {"style": "pointing", "label": "a", "points": [[0.5, 0.5]], "point_scale": 1}
    pixels = {"style": "pointing", "label": "a", "points": [[100, 50]]}
    for task in (written, numbers, pixels):
        assert scored(task, '<point x="54.9" y="50.0" alt="a">a</point>') == 1
        assert scored(task, '<point x="50.0" y="59.9" alt="a">a</point>') == 1
        assert scored(task, '<point x="50.0" y="60.1" alt="a">a</point>') == 0
        assert scored(task, "There are none.") == 0
    assert scored(written, '<point x="54.9" y="50.0" alt="a">a</point>', point_radius=0.02) == 0


def shard(*records: dict, first: int = 0) -> pa.Table:
    """Rows as of a shard: a score by type for each record, or why it was rejected."""
    rows = []
    for i, scores in enumerate(records, first):
        if "rejected" in scores:
            rows.append({"record": i, **scores})
        metrics = {kind: "pointing" if kind == "pointing" else "vqa_score" for kind in scores if kind != "rejected"}
        for k, (kind, metric) in enumerate(metrics.items()):
            named = [("f1" if metric == "pointing" else metric, scores[kind])]
            rows.append({"record": i, "number": k, "type": kind, "metric": metric, "score": scores[kind], "scores": named})
    return pa.Table.from_pylist(rows, SCHEMA)


def test_summary():
    tally = Tally()
    tally.add(shard({"colour": 1, "pointing": 0}, {"rejected": "x"}))
    tally.add(shard({"colour": 0, "shape": 1}, first=2))
    report = summarise(tally, {})
    assert report["questions"] == 3
    assert report["overall"] == pytest.approx(2 / 3, abs=1e-4)
    colour = {"score": 0.5, "low": 0, "high": 1}
    assert report["types"]["colour"] == {"questions": 2, "metric": "vqa_score", **colour, "scores": {"vqa_score": colour}}
    assert report["types"]["pointing"]["score"] == 0
    assert report["low"] <= report["overall"] <= report["high"]
    assert (report["rejected"], report["reasons"]) == (1, {"x": 1})


def test_picture_shows_all_types_and_the_whole_set():
    tally = Tally()
    tally.add(shard(*[{"colour": 1, "pointing": 1, "shape": 1}] * 90))
    chosen = spread(tally.kind, tally.record, 9)
    assert tally.record[chosen].tolist() == list(range(0, 90, 10))
    assert [tally.kinds[k][0] for k in tally.kind[chosen]] == ["colour", "pointing", "shape"] * 3
    assert len(spread(tally.kind[:6], tally.record[:6], 9)) == 2
    assert spread(tally.kind[:0], tally.record[:0], 3) == []


def test_a_metric_that_does_not_exist_is_named_with_its_key():
    with pytest.raises(ConfigError, match=r"metrics\.chart: no metric is called 'anl' \(did you mean anls"):
        EvaluateConfig(model="m", records="r", output="o", metrics={"chart": "anl"})
