"""What the forms of records make of weights, systems' words, options and points, down to the tokens that are trained on."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from molmo_core.models.base import BaseModelConfig
from pipelines.data.builder import ExampleBuilder, example_rng
from pipelines.data.preparation.shards import write_shard
from pipelines.data.preparation.train_tokenizer import train_tokenizer
from pipelines.data.records.reading import read_record
from pipelines.data.rejects import Rejected
from pipelines.data.sources import Record, open_records


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (9, 200, 9)).save(buffer, "PNG")
    return buffer.getvalue()


PNG = picture()
USER, ASSISTANT = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}
QA = {"question": "What?", "answer": "That."}


def read(data):
    return read_record(Record("/set/r.jsonl", 0, data))


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["What is this? Noise number 0123456789."], 300, folder)
    model = BaseModelConfig.load("configs/models/demo.yaml", overrides=[f"llm.tokenizer.identifier={folder}"])
    return ExampleBuilder(model.build_preprocessor(for_inference=False, max_seq_len=256), 10_000_000)


@pytest.fixture
def texts(builder):
    """The whole text of a record, and {loss weight: text}."""

    def made(data):
        example = builder(Record("/set/r.jsonl", 0, data), example_rng(0, 0, 0, 0))
        decode = builder.preprocessor.tokenizer.decode
        weights = example["loss_masks"]
        trained = {float(w): decode(example["labels"][weights == w], truncate_at_eos=False) for w in np.unique(weights[weights > 0])}
        return decode(example["input_ids"], truncate_at_eos=False), trained

    return made


CHAT = [("user", "What is it?"), ("assistant", "wrong"), ("user", "No."), ("assistant", "right")]
FORMS = {
    "chat": lambda marks: {"messages": [{"role": r, "content": t, **marks.get(i, {})} for i, (r, t) in enumerate(CHAT)]},
    "llava": lambda marks: {"conversations": [{"from": r, "value": t, **marks.get(i, {})} for i, (r, t) in enumerate(CHAT)]},
    "tree": lambda marks: {"image": PNG, "message_list": [FORMS["chat"](marks)]},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"loss": False}, {"train": False}, {"loss_weight": 0}, {"loss": 0}])
def test_a_marked_answer_is_not_trained_on(texts, form, mark):
    whole, trained = texts(FORMS[form]({1: mark}))
    plain, both = texts(FORMS[form]({}))
    assert whole == plain
    ((_, words),) = both.items()
    assert "wrong" in words
    ((_, words),) = trained.items()
    assert words.split() == ["right"]


def test_weights_of_turns_are_factors(texts):
    _, trained = texts(FORMS["chat"]({1: {"weight": 0.25}, 3: {"weight": 2}, 0: {"weight": 0}, 2: {"train": False}}))
    first, second = sorted(trained)
    assert second == 8 * first
    assert (trained[first].strip(), trained[second].strip()) == ("wrong", "right")


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        ({1: {"weight": "0"}}, r"\[1\].weight must be a number, 0 or more, found '0'"),
        ({1: {"weight": -1}}, r"\[1\].weight must be"),
        ({1: {"weight": float("nan")}}, r"\[1\].weight must be"),
        ({1: {"weight": 10**400}}, r"\[1\].weight must be"),
        ({1: {"loss": "false"}}, r"\[1\].loss must be true or false, found 'false'"),
        ({1: {"train": 2}}, r"\[1\].train must be true or false"),
        ({1: {"train": True, "weight": 0}}, r"\[1\].weight, train contradict each other"),
        ({0: {"weight": 1}}, r"\[0\].weight: only answers are trained on"),
        ({0: {"train": True}}, r"\[0\].train: only answers are trained on"),
        ({1: {"mask": True}}, r"\[1\].mask: not read, .* write weight"),
        ({1: {"trainable": False}}, r"\[1\].trainable: not read, .* write weight"),
    ],
)
@pytest.mark.parametrize("form", ["chat", "llava"])
def test_other_marks_reject_the_row(form, marks, message):
    with pytest.raises(Rejected, match=message):
        read(FORMS[form](marks))


@pytest.mark.parametrize(
    "row",
    [
        FORMS["chat"]({1: {"weight": 0}, 3: {"loss": False}}),
        {"messages": ["What?", "That."], "weight": 0},
        {"image": PNG, "message_list": [{**QA, "weight": 0}, FORMS["chat"]({1: {"weight": 0}, 3: {"weight": 0}})]},
        {"image": PNG, "message_list": [QA, QA], "message_weight": {"weight": 0}},
    ],
)
def test_nothing_to_train_on(texts, row):
    with pytest.raises(Rejected, match="record: nothing to train on: weight is 0 for all of its answers"):
        texts(row)


@pytest.mark.parametrize("field", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ASSISTANT]},
        {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]},
        {"messages": [{"role": "system", "content": "Answer briefly."}, USER, ASSISTANT]},
        {"messages": ["What?", "That."]},
    ],
)
def test_a_system_has_one_meaning_wherever_it_stands(row, field):
    expected = read({"messages": [{"role": "system", "content": "Answer briefly."}, USER, ASSISTANT]})["messages"]
    assert expected == [{"role": "user", "content": "Answer briefly.\nWhat?"}, ASSISTANT]
    assert read({**row, field: "Answer briefly."})["messages"] == expected
    assert read({"image": PNG, **QA, field: "Answer briefly."})["question"] == "Answer briefly.\nWhat?"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [USER, ASSISTANT], "system": "a", "system_prompt": "b"}, "system and system_prompt differ"),
        ({"messages": [{"role": "system", "content": "a"}, USER, ASSISTANT], "system": "b"}, "give only one of them"),
        ({"messages": [USER, ASSISTANT], "system": ["a"]}, "system: text is needed"),
        ({"image": PNG, "caption": "A cat.", "system": "a"}, "system: this caption record has no question that it could join"),
        ({"image": PNG, "message_list": [QA], "system": "a"}, "system: message_list has several questions"),
    ],
)
def test_a_system_that_cannot_be_used(row, message):
    with pytest.raises(Rejected, match=message):
        read(row)


@pytest.mark.parametrize("options", [{"options": ["cat", "dog"]}, {"choices": ["cat", "dog"]}, {"options": {"A": "cat", "B": "dog"}}])
@pytest.mark.parametrize(
    "answer",
    [{"answer": a} for a in ("B", "b", "(B)", "(b)", "B.", "B)", "B:", "dog", " Dog ", 1, "B. dog", "(B) dog", ["dog"])]
    + [{"answer_idx": 1}, {"answer_idx": 1.0}, {"answer_index": 1}, {"answer_idx": 1, "answer": "dog"}, {"answers": ["B"]}],
)
def test_options_and_their_answer(texts, options, answer):
    whole, trained = texts({"image": PNG, "question": "Which?", **options, **answer})
    expected, expected_trained = texts({"image": PNG, "question": "Which?", "options": ["cat", "dog"], "answer_idx": 1})
    assert (whole, trained) == (expected, expected_trained)
    assert "A: cat\nB: dog" in whole
    assert [words.strip() for words in trained.values()] == ["B"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"options": ["cat", "dog"], "answer": "bird"}, "answer 'bird' is none of the options: write answer_idx"),
        ({"choices": ["cat", "dog"], "answer": 2}, "answer 2 is none of the choices: write answer_idx"),
        ({"options": ["cat", "dog"], "answer": "1"}, "answer '1' is none of the options"),
        ({"options": ["1", "2", "3"], "answer": 1}, "answer 1 could mean the options 0, 1: write answer_idx"),
        ({"options": ["a", "a"], "answer": "a"}, "could mean the options 0, 1"),
        ({"options": ["b", "a"], "answer": "a"}, "could mean the options 0, 1"),
        ({"options": ["cat", "dog"], "answer": "B. cat"}, "is none of the options"),
        ({"options": ["cat", "dog"], "answer": "dog", "answer_idx": 0}, "answer 'dog' is not option 0 of the options, as answer_idx says"),
        ({"options": ["cat", "dog"], "choices": ["a", "b"], "answer_idx": 0}, "options and choices: give only one"),
        ({"options": ["cat", "dog"], "answer": "cat", "answers": ["dog"]}, "answer and answers: give only one"),
        ({"options": [], "answer": "cat"}, "options must be a non-empty list of strings"),
        ({"options": {"A": ["x"]}, "answer": "A"}, "options: a list of texts is needed"),
    ],
)
def test_answers_that_are_no_option_or_two(fields, message):
    with pytest.raises(Rejected, match=message):
        read({"image": PNG, "question": "Which?", **fields})


def test_options_in_columns_and_in_trees():
    columns = {"question": "Which?", "choices": {"text": ["cat", "dog"], "label": ["1", "2"]}, "answer": "2"}
    wanted = {"question": "Which?", "options": ["cat", "dog"], "option_names": ["1", "2"], "answer_idx": 1}
    assert read({"image": PNG, **columns}).items() >= wanted.items()
    assert read({"image": PNG, "message_list": [columns]})["message_list"] == [wanted | {"style": "demo"}]


@pytest.mark.parametrize("media", [{"image": PNG}, {"image_url": "https://x.org/a.jpg"}, {"file_name": "a.png"}])
@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ({"points": [{"x": 15.8, "y": 40}]}, {"points": [[15.8, 40.0]], "point_scale": 100}),
        ({"points": [{"x": 0.158, "y": 0.4}], "point_scale": 1}, {"points": [[0.158, 0.4]], "point_scale": 1}),
        ({"points": [[15.8, 40]], "point_scale": 100}, {"points": [[15.8, 40.0]], "point_scale": 100}),
        ({"points": [[15.8, 40]]}, {"points": [[15.8, 40.0]]}),
        ({"points": {"x": [15.8], "y": [40]}}, {"points": [[15.8, 40.0]]}),
        ({"points": []}, {"points": []}),
    ],
)
def test_points_as_people_write_them(media, points, expected):
    for row in ({"label": "ball"}, {"question": "Where is the ball?"}):
        made = read({**media, **row, **points})
        assert {k: v for k, v in made.items() if k.startswith("point")} in (expected, expected | {"point_scale": 100})
        assert made["style"] == "pointing"
    counted = read({**media, "label": "ball", **points, "count": len(expected["points"])})
    assert counted["style"] == "point_count"


@pytest.mark.parametrize("points", [{"x": 1, "y": 2}, [1, 2], ["1,2"], [{"X": 1, "Y": 2}], "[[1, 2]]", 5, [{"x": 1}], [[1, 2, 3]]])
def test_other_points_say_what_to_write(points):
    with pytest.raises(
        Rejected, match=r"points: a list of \[x, y\] .*, a list of {x, y} .*, or {x: \[...\], y: \[...\]} .* is needed, found"
    ):
        read({"image": PNG, "label": "ball", "points": points})


def test_counts():
    assert read({"image": PNG, "label": "cups", "count": 3}).items() >= {"question": "How many cups are there?", "answer": "3"}.items()
    assert read({"image": PNG, "question": "How many?", "count": 3})["answer"] == "3"
    with pytest.raises(Rejected, match="count is 2, but there are 1 points"):
        read({"image": PNG, "label": "cups", "count": 2, "points": [{"x": 1, "y": 2}]})


def test_messages_as_text_and_as_columns():
    expected = read({"messages": [USER, ASSISTANT]})
    assert read({"messages": json.dumps([USER, ASSISTANT])}) == expected
    assert read({"messages": {"role": ["user", "assistant"], "content": ["What?", "That."]}}) == expected
    assert read({"conversations": json.dumps([{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}])}) == expected
    with pytest.raises(Rejected, match="messages: a list is needed, found a text that is not JSON: 'What"):
        read({"messages": "What? That."})
    with pytest.raises(Rejected, match="messages: a list is needed, found dict"):
        read({"messages": USER})


def test_a_clip_in_a_part():
    part = {"type": "video", "video": "v.mp4", "start": 1, "video_end": 2.5, "fps": 2}
    made = read({"messages": [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}, ASSISTANT]})
    assert (made["video"], made["clip_start"], made["clip_end"]) == ("/set/v.mp4", 1, 2.5)


def test_a_shard_counts_the_fields_that_were_not_used(builder, tmp_path):
    """Rows in = rows out + rejected, and every other field has its number."""
    rows = [{"messages": ["What?", "That."], "split": "train", "source": "a b"}, {"messages": ["What?", "That."], "split": "test"}]
    rows += [{"messages": ["What?", "That."], "split": "test", "hint": "look left"}, {"messages": ["What?"], "split": "test"}]
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = write_shard(tmp_path, 0, range(4), open_records(str(path)), builder, 0)
    assert summary["fields_not_used"] == {"split": 2, "source": 1}
    assert (summary["rows_out"], [detail.partition(":")[0] for *_, detail in summary["rejected"]]) == (
        2,
        ["hint", "the assistant says nothing"],
    )
