"""A preparation as far as it needs no Ray: whose folder it is, whose tokenizer it takes, what it notes, and damage that is found."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from molmo_core.config import ConfigError
from molmo_core.registry import BaseModelConfig
from pipelines.data.batches.belonging import check_data, check_weights
from pipelines.data.batches.prepared import PreparedDataset
from pipelines.data.builder import ExampleBuilder
from pipelines.data.config import DataConfig, PrepareConfig
from pipelines.data.preparation import books
from pipelines.data.preparation.checksums import BLOCK, BlockCheck, checksums
from pipelines.data.preparation.prepare import Preparation
from pipelines.data.preparation.shards import write_shard
from pipelines.data.preparation.train_tokenizer import train_tokenizer
from pipelines.data.rejects import Rejects, TooManyRejected
from pipelines.data.sources import open_records

ROOT = Path(__file__).parents[4]


@pytest.fixture
def checkpoint(golden, tmp_path) -> Path:
    """A checkpoint folder as training leaves it: configuration and tokenizer in it."""
    folder = tmp_path / "checkpoint"
    config = BaseModelConfig.load(golden / "molmo-qwen2-siglip-bidir", [f"llm.tokenizer.identifier={golden / 'tokenizer'}"])
    config.build_model().save_checkpoint(folder)
    return folder


def preparation(records: Path, output: Path, *overrides: str) -> Preparation:
    return Preparation(PrepareConfig.load(ROOT / "configs/data/records.yaml", [f"records={records}", f"output={output}", *overrides]))


def made(prepared: Preparation) -> Preparation:
    """Makes the missing shards in this process."""
    builder = ExampleBuilder(prepared.preprocessor, prepared.config.max_image_pixels)
    for k in prepared.todo:
        rows = range(k * prepared.config.shard_rows, min(prepared.total, (k + 1) * prepared.config.shard_rows))
        prepared.done[k] = write_shard(prepared.folder, k, rows, prepared.records, builder, prepared.config.seed)
    prepared.report = books.close(
        prepared.folder, prepared.done, prepared.total, 512, prepared.made_for, prepared.total, 1.0, prepared.held_out
    )
    prepared.close()
    return prepared


def data(folder: Path, **settings) -> DataConfig:
    return DataConfig.from_dict({"datasets": {"mine": {"path": str(folder), **settings}}})


def test_held_out_records_are_not_prepared_but_named(checkpoint, make, tmp_path):
    rows = [make.chat(question="How?", answer=f"{i}") | {"id": i} for i in range(40)]
    rows[7]["messages"] = []
    path = make.write_jsonl(tmp_path / "in.jsonl", rows)
    whole = open_records(str(path))
    split = [f"model={checkpoint}", "split.test=0.2"]
    prepared = made(preparation(path, tmp_path / "out", *split))
    held_out = open_records(str(tmp_path / "out/test.part.json"))
    report = prepared.report
    assert report["rows_held_out"] == len(held_out) == prepared.held_out > 0
    assert report["rows_in"] + report["rows_held_out"] == len(whole)
    assert report["rows_in"] == report["rows_out"] + report["rows_rejected"]
    dataset = PreparedDataset(tmp_path / "out")
    train = {dataset[i]["metadata"]["id"] for i in range(len(dataset))}
    test = {held_out[i].data["id"] for i in range(len(held_out))}
    assert train.isdisjoint(test)
    assert sorted({7} | train | test) == list(range(40))
    assert preparation(path, tmp_path / "out", *split).report == json.loads((tmp_path / "out/report.json").read_text())
    for other in (split[:1], [split[0], "split.test=0.3"]):
        with pytest.raises(ConfigError, match=r"holds another preparation \(split changed\)"):
            preparation(path, tmp_path / "out", *other)
    # Preparing what was held out is a preparation like any other.
    assert made(preparation(tmp_path / "out/test.part.json", tmp_path / "test", split[0])).report["rows_in"] == len(held_out)
    assert not (tmp_path / "test/test.part.json").exists()


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5])
def test_shares_that_leave_nothing_are_refused(share):
    with pytest.raises(ConfigError, match=r"split\.test"):
        PrepareConfig.load(ROOT / "configs/data/records.yaml", [f"split.test={share}"])


def test_a_checkpoint_keeps_its_tokenizer(checkpoint, good_records, tmp_path):
    """The recipe's `tokenizer: {vocab_size: 512}` is for models that start from nothing."""
    prepared = made(preparation(good_records, tmp_path / "out", f"model={checkpoint}"))
    assert not (tmp_path / "out" / "tokenizer").exists()
    model = BaseModelConfig.load(checkpoint)
    assert prepared.preprocessor.tokenizer.fingerprint == model.build_tokenizer().fingerprint
    example = PreparedDataset(tmp_path / "out")[0]
    assert "Noise number 0." in model.build_tokenizer().decode(example["input_ids"], truncate_at_eos=False)
    check_data(data(tmp_path / "out"), model)
    again = preparation(good_records, tmp_path / "out", f"model={checkpoint}", "tokenizer=null")
    assert again.report == prepared.report, "said or not, it is the same preparation"
    fresh = preparation(good_records, tmp_path / "new")
    assert (tmp_path / "new" / "tokenizer" / "tokenizer.json").is_file(), "a configuration file's tokenizer is trained when asked for"
    assert fresh.preprocessor.tokenizer.fingerprint != model.build_tokenizer().fingerprint


def test_data_of_another_model_are_refused(checkpoint, good_records, golden, tmp_path):
    folder = made(preparation(good_records, tmp_path / "out", f"model={checkpoint}")).folder
    train_tokenizer(["Some other texts, with other words."], 400, tmp_path / "other")
    golden_tokenizer = f"llm.tokenizer.identifier={golden / 'tokenizer'}"
    for overrides, said in [
        ([f"llm.tokenizer.identifier={tmp_path / 'other'}"], f"another tokenizer.*model={checkpoint}.*prepare the records for this model"),
        (["llm.embedding_size=512", golden_tokenizer], "another tokenizer"),  # other ids of the image tokens
        (["mm_preprocessor.max_crops=3"], r"mm_preprocessor.max_crops was 6 and is 3.*data.datasets.mine.overrides.max_crops"),
        (["data_formatter.always_start_with_space=true"], "data_formatter.always_start_with_space was False and is True"),
        (["vision_backbone.vit.resize_mode=default"], "images.resize_mode was 'siglip' and is 'default'"),
    ]:
        model = BaseModelConfig.load(checkpoint, overrides)
        with pytest.raises(ConfigError, match=said):
            check_data(data(folder), model)
    with pytest.raises(ConfigError, match="max_crops"):
        check_data(data(folder, overrides={"max_crops": 3}), BaseModelConfig.load(checkpoint))
    on_purpose = BaseModelConfig.load(checkpoint).mm_preprocessor.max_crops
    check_data(data(folder, overrides={"max_crops": on_purpose}), BaseModelConfig.load(checkpoint, ["mm_preprocessor.max_crops=3"]))
    demo = made(preparation(good_records, tmp_path / "demo")).folder
    with pytest.raises(ConfigError, match=f"give it the tokenizer.*model.llm.tokenizer.identifier={demo}/tokenizer"):
        check_data(data(demo), BaseModelConfig.load(ROOT / "configs/models/demo.yaml", [f"llm.tokenizer.identifier={tmp_path / 'other'}"]))
    own = f"llm.tokenizer.identifier={demo / 'tokenizer'}"
    check_data(data(demo), BaseModelConfig.load(ROOT / "configs/models/demo.yaml", [own]))
    dataset = json.loads((folder / "dataset.json").read_text())
    del dataset["made_for"]
    (folder / "dataset.json").write_text(json.dumps(dataset))
    with pytest.raises(ConfigError, match="does not say for which model"):
        check_data(data(folder), BaseModelConfig.load(checkpoint))


def test_weights_of_another_tokenizer_are_refused(checkpoint, golden, tmp_path):
    model = BaseModelConfig.load(golden / "molmo-qwen2-siglip-bidir", [f"llm.tokenizer.identifier={golden / 'tokenizer'}"])
    check_weights(checkpoint, model)
    check_weights(golden / "molmo-qwen2-siglip-bidir", model)  # has none
    larger = ["llm.embedding_size=512", f"llm.tokenizer.identifier={golden / 'tokenizer'}"]
    with pytest.raises(ConfigError, match=r"init_from=.*whose embedding has 512 rows"):
        check_weights(checkpoint, BaseModelConfig.load(golden / "molmo-qwen2-siglip-bidir", larger))
    train_tokenizer(["Some other texts, with other words."], 400, tmp_path / "other")
    other = BaseModelConfig.load(golden / "molmo-qwen2-siglip-bidir", [f"llm.tokenizer.identifier={tmp_path / 'other'}"])
    with pytest.raises(ConfigError, match=f"init_from={checkpoint} has another tokenizer.*identifier={checkpoint}/tokenizer"):
        check_weights(checkpoint, other)


def test_what_is_not_there_is_said_before_anything_starts(checkpoint, good_records, tmp_path):
    model = BaseModelConfig.load(checkpoint)
    with pytest.raises(ConfigError, match="no such file or folder"):
        check_data(data(tmp_path / "nothing.jsonl"), model)
    with pytest.raises(ConfigError, match="packing streamed records needs their inventory"):
        check_data(DataConfig.from_dict({"datasets": {"x": {"path": str(good_records)}}, "packing": {}}), model)
    check_data(data(good_records), model)
    preparation(good_records, tmp_path / "out", f"model={checkpoint}")
    with pytest.raises(ConfigError, match=r"is not finished: run `python -m jobs.prepare` again"):
        check_data(data(tmp_path / "out"), model)


def test_a_preparation_that_fails_early_claims_nothing(checkpoint, good_records, tmp_path):
    out = tmp_path / "out"
    without = tmp_path / "model.yaml"
    BaseModelConfig.load(checkpoint, ["llm.tokenizer.identifier=./nowhere"]).save(without)
    with pytest.raises(ConfigError, match="no such tokenizer folder"):
        preparation(good_records, out, "tokenizer=null", f"model={without}")
    assert not (out / "prepare.json").exists()
    preparation(good_records, out, "tokenizer.vocab_size=300")
    first = (out / "tokenizer" / "tokenizer.json").read_text()
    preparation(good_records, out, "tokenizer.vocab_size=400", "seed=3")  # killed before its first shard: another may begin
    assert (out / "tokenizer" / "tokenizer.json").read_text() != first
    made(preparation(good_records, out, f"model={checkpoint}"))
    with pytest.raises(ConfigError, match=r"holds another preparation \(seed changed\)"):
        preparation(good_records, out, f"model={checkpoint}", "seed=1")


@pytest.mark.parametrize("output", ["/proc/x", "/sys/x/y", "FILE/x"])
def test_an_output_that_cannot_be_written(good_records, tmp_path, output):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output=.*: cannot be written \(.*\); choose another folder"):
        preparation(good_records, Path(output.replace("FILE", str(tmp_path / "file"))))


def test_model_settings_do_not_belong_into_a_preparation():
    with pytest.raises(ConfigError, match="model is the path"):
        PrepareConfig.load(ROOT / "configs/data/records.yaml", ["model.llm.n_layers=2"])


def test_every_flipped_byte_is_found(checkpoint, good_records, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.data.preparation.shards._BATCH_BYTES", 60_000)
    monkeypatch.setattr("pipelines.data.preparation.checksums.BLOCK", 4096)
    prepared = made(preparation(good_records, tmp_path / "out", f"model={checkpoint}", "shard_rows=20"))
    right = [example["input_ids"].tolist() for example in map(PreparedDataset(prepared.folder).__getitem__, range(40))]
    path = prepared.folder / "shard-00001.arrow"
    whole, r = path.read_bytes(), random.Random(0)
    assert len(whole) > 10 * 4096
    for at in [0, 8, *range(len(whole) - 1, len(whole) - 6000, -600), *(r.randrange(len(whole)) for _ in range(60))]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << r.randrange(8))]) + whole[at + 1 :])
        dataset = PreparedDataset(prepared.folder)
        assert [dataset[i]["input_ids"].tolist() for i in range(20)] == right[:20], "another shard is not touched"
        with pytest.raises(ConfigError, match=r"shard-00001.arrow: damaged .*jobs.prepare` again"):
            [dataset[i] for i in range(20, 40)]
    for rest, said in ((whole[:-1], "bytes of"), (None, "missing")):
        path.unlink() if rest is None else path.write_bytes(rest)
        with pytest.raises(ConfigError, match=f"shard-00001.arrow: damaged .*{said}"):
            PreparedDataset(prepared.folder)
        again = preparation(good_records, tmp_path / "out", f"model={checkpoint}", "shard_rows=20")
        assert (again.report, again.todo) == (None, [1])
        again.close()
    made(again)
    assert path.read_bytes() == whole, "made again, byte for byte"
    summary = path.with_suffix(".json")
    for rest in (summary.read_text()[:-9], None):
        summary.unlink() if rest is None else summary.write_text(rest)
        with pytest.raises(ConfigError, match=r"shard-00001.arrow: damaged \(shard-00001.json, which commits it, is missing or damaged\)"):
            PreparedDataset(prepared.folder)[20]
        again = preparation(good_records, tmp_path / "out", f"model={checkpoint}", "shard_rows=20")
        assert (again.report, again.todo) == (None, [1])
        again.close()
    made(again)
    assert preparation(good_records, tmp_path / "out", f"model={checkpoint}", "shard_rows=20").report is not None


def test_checksums_of_large_files(tmp_path):
    content = np.random.default_rng(0).bytes(2 * BLOCK + 5)
    (tmp_path / "x").write_bytes(content)
    expected = checksums(tmp_path / "x")
    assert len(expected) == 3
    bad = bytearray(content)
    bad[BLOCK + 7] ^= 1
    check = BlockCheck(memoryview(bad), expected)
    assert check.damaged(0, BLOCK) is None
    assert check.damaged(BLOCK - 1, BLOCK + 1) == 1
    assert check.damaged(2 * BLOCK, len(content)) is None


def test_a_stop_says_what_was_wrong_and_what_to_do(tmp_path):
    rejected = [
        ["a.jsonl", 3, "record: cannot be preprocessed", "ValueError: this model takes images only; for videos use Molmo2 or VideoOlmo"],
        ["a.jsonl", 5, "record: cannot be preprocessed", "ValueError: another"],
    ]
    done = {0: {"rows_in": {"a.jsonl": 3}, "rejected": rejected}}
    rejects = Rejects(0.0)
    rejects.add(done[0]["rows_in"], rejected)
    with pytest.raises(TooManyRejected) as error:
        rejects.check()
    message = str(books.stop(tmp_path, done, error.value))
    assert "record: cannot be preprocessed, first in a.jsonl, row 3: ValueError: this model takes images only; for videos use" in message
    assert "corrected records or a model that takes them" in message
    assert "missing media" not in message
    assert (tmp_path / "rejected.parquet").is_file()
    done[0]["rejected"].append(["a.jsonl", 7, "media: missing file", "/x/y.png"])
    assert "when the missing media are there (they are tried again)" in str(books.stop(tmp_path, done, error.value))


def test_two_preparations_at_once_are_kept_apart(checkpoint, make, tmp_path):
    records = tmp_path / "records.jsonl"
    records.write_text(json.dumps(make.chat(question="How?", answer="so")) + "\n")
    first = preparation(records, tmp_path / "out", f"model={checkpoint}")
    with pytest.raises(ConfigError, match="another preparation is at work in this folder"):
        preparation(records, tmp_path / "out", f"model={checkpoint}")
    preparation(records, tmp_path / "other", f"model={checkpoint}").close()
    made(first)
    assert preparation(records, tmp_path / "out", f"model={checkpoint}").report == first.report
