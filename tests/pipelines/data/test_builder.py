"""One record → one example, or a reason why not."""

import numpy as np
import pytest

from molmo_core.models.base import BaseModelConfig
from molmo_core.preprocessing.media import load_image
from pipelines.data.builder import ExampleBuilder, example_rng
from pipelines.data.preparation.train_tokenizer import train_tokenizer
from pipelines.data.records.media import Media
from pipelines.data.rejects import Rejected
from pipelines.data.sources import Record, open_records

LIMIT = 10_000_000


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["What is this? Noise number 0123456789."], 300, folder)
    return folder


def load(name, tokenizer, length):
    model = BaseModelConfig.load(f"configs/models/{name}.yaml", overrides=[f"llm.tokenizer.identifier={tokenizer}"])
    return ExampleBuilder(model.build_preprocessor(for_inference=False, max_seq_len=length), LIMIT)


@pytest.fixture(scope="module")
def builder(tokenizer):
    return load("demo", tokenizer, 256)


def rng(i=0):
    return example_rng(0, 0, 0, i)


def test_good_records_become_examples(builder, good_records):
    records = open_records(str(good_records))
    examples = [builder(records[i], rng(i)) for i in range(len(records))]
    assert all((e["loss_masks"] > 0).any() for e in examples)
    assert ["images" in e for e in examples] == [True] * 38 + [False, True]
    assert examples[-1]["subsegment_ids"].max() == 10_000
    assert examples[0]["images"].dtype == np.uint8


@pytest.mark.parametrize("name", ["<|image|>", "<|video|>", "<|endoftext|>", "<im_patch>"])
def test_text_that_looks_like_a_special_token_stays_text(builder, make, tmp_path, name):
    words = f"what is {name}"
    make.picture(tmp_path / "a.png")
    picture = str(tmp_path / "a.png")
    tokenizer = builder.preprocessor.tokenizer
    plain = builder.build({"messages": ["a", "b"], "image": picture, "metadata": {}}, rng())
    for fields in ({"question": words, "answer": words}, {"messages": [words, words]}):
        record = Record("/set/a.jsonl", 0, fields)
        built = builder.build({**builder.example(record), "image": picture}, rng())
        assert set(built["input_ids"]) & tokenizer.image_token_ids == set(plain["input_ids"]) & tokenizer.image_token_ids
        assert built["images"].shape == plain["images"].shape
        text = [i for i in [*built["input_ids"], built["labels"][-1]] if i not in tokenizer.image_token_ids]
        assert tokenizer.decode(text[1:-1], truncate_at_eos=False).count(words) == 2
        assert builder.measure(record, Media([load_image(picture).shape[:2]], None, 0.0), rng())[0] == len(built["input_ids"])


def test_every_corruption_has_its_reason(tokenizer, make, tmp_path):
    builder = load("molmo2-4b", tokenizer, 1024)
    make.picture(tmp_path / "0.png")
    rows, expected = make.corrupt_corpus(tmp_path / "corrupt")
    records = open_records(str(make.write_jsonl(tmp_path / "bad.jsonl", rows)))
    assert len(records) == len(rows)
    for i, reason in enumerate(expected):
        with pytest.raises(Rejected) as caught:
            builder(records[i], rng(i))
        assert caught.value.reason.startswith(reason), (i, str(caught.value))
        assert caught.value.detail


def test_a_model_without_videos_does_not_train_on_their_text_alone(builder, make, tmp_path):
    make.clip(tmp_path / "a.mp4")
    records = open_records(str(make.write_jsonl(tmp_path / "a.jsonl", [make.chat(video="a.mp4")])))
    with pytest.raises(Rejected, match=r"cannot be preprocessed: .* has a video, but the model takes text and images only"):
        builder(records[0], rng())
    assert builder.measure(records[0], Media([], np.arange(20) / 10, 10.0), rng()) == (1, 0)


def test_randomness_is_the_examples_own():
    draws = [example_rng(*key).randint(1 << 30) for key in ((0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1))]
    assert len(set(draws)) == 5
    assert example_rng(1, 2, 3, 4).randint(1 << 30) == example_rng(1, 2, 3, 4).randint(1 << 30)


def test_defaults_fill_gaps(builder):
    seen = {}

    def spy(example, rng):
        seen.update(example)
        return {"input_ids": np.arange(2), "loss_masks": np.ones(2, np.float32)}

    record = Record("x.jsonl", 0, {"messages": ["a", "b"], "metadata": {"k": 1}})
    example = ExampleBuilder(spy, LIMIT, {"message_weight": {"weight": 0.2}, "style": "demo"})(record, rng())
    assert seen["message_weight"] == {"weight": 0.2}
    assert example["metadata"] == {"k": 1}


WILD = [
    {"metadata": "train"},
    {"id": "\ud800"},
    {"messages": [{"role": ["user"], "content": "?"}, {"role": "assistant", "content": "x"}]},
    {"messages": ["\ud800", "x"]},
    {"messages": 5},
    {"message_list": [{"messages": 5}]},
    {"style": ["demo"], "question": "?", "answer": "x"},
    {"label": "x", "points": 5, "style": "pointing"},
    {"label": "x", "tracks": [[1]], "timestamps": [1], "style": "pointing"},
    {"message_weight": 5, "message_list": [{"question": "?", "answer": "x", "message_weight": 5}]},
    {"image": {"bytes": {}}},
    {"video": 5},
    {"conversations": {"from": "human"}},
    {"image_url": {"url": ["a"]}, "question": "?", "answer": "x"},
]


@pytest.mark.parametrize("fields", WILD, ids=[str(ascii(fields))[:50] for fields in WILD])
def test_no_row_stops_a_run(builder, fields):
    record = Record("x.jsonl", 0, {} if {"messages", "message_list", "conversations"} & fields.keys() else {"messages": ["a", "b"]})
    record.data |= fields
    if "question" in fields or "label" in fields:
        del record.data["messages"]
    with pytest.raises(Rejected) as caught:
        builder(record, rng())
    assert str(caught.value).encode()
    assert builder.measure(record, Media([], None, None), rng()) == (1, 0)


def test_a_label_beside_a_question_is_not_read(builder, make, tmp_path):
    make.picture(tmp_path / "0.png")
    row = {"image": "0.png", "question": "What is this?", "answer": "Noise."}
    plain, labelled = (builder(Record(str(tmp_path / "a.jsonl"), 0, data), rng()) for data in (row, row | {"label": "x"}))
    np.testing.assert_array_equal(plain["input_ids"], labelled["input_ids"])


def test_one_transcript_is_drawn_each_time(builder, make, tmp_path):
    make.picture(tmp_path / "0.png")
    texts = ["one", "two", "three"]
    record = Record(str(tmp_path / "a.jsonl"), 0, {"image_url": "0.png", "caption": "A cat.", "transcripts": texts})
    tokenizer = builder.preprocessor.tokenizer
    drawn = set()
    for i in range(30):
        example = builder(record, rng(i))
        answers = tokenizer.decode(example["labels"][example["loss_masks"] > 0], truncate_at_eos=False)
        (found,) = [text for text in texts if text in answers]
        drawn.add(found)
        assert builder.measure(record, Media([(30, 40)], None, None), rng(i))[0] == len(example["input_ids"])
    assert drawn == set(texts)


def test_empty_votes_do_not_count(builder):
    answers = ["", "", "Noise."]
    example = builder(Record("a.jsonl", 0, {"question": "What is this?", "answers": answers}), rng())
    assert builder.preprocessor.tokenizer.decode(example["labels"][example["loss_masks"] > 0]).strip() == "Noise."
