"""One record → one example, or a reason why not."""

import numpy as np
import pytest

from molmo_core.models.base import BaseModelConfig
from pipelines.data.builder import ExampleBuilder, example_rng
from pipelines.data.inventory import Media
from pipelines.data.sources import Record, Rejected, open_records
from pipelines.data.tokenizer import train_tokenizer

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
    example = ExampleBuilder(spy, LIMIT, {"sampler_overrides": {"max_frames": 3}, "style": "demo"})(record, rng())
    assert seen["sampler_overrides"] == {"max_frames": 3}
    assert example["metadata"] == {"k": 1}
