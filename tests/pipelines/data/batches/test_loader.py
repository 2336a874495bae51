"""The loader: the same global batches on any number of workers, through any number of stops, and clear errors."""

from __future__ import annotations

import hashlib
import json
import random
import threading

import numpy as np
import pytest

from molmo_core.config import ConfigError
from molmo_core.models.base import BaseModelConfig
from molmo_core.preprocessing.collator import MMCollator
from pipelines.data.batches.loader import TrainLoader, prefetched
from pipelines.data.batches.packs import PackBuilder, Prepared
from pipelines.data.batches.plan import Draw
from pipelines.data.batches.prepared import PreparedDataset
from pipelines.data.config import DataConfig
from pipelines.data.preparation.books import close
from pipelines.data.preparation.shards import write_shard
from pipelines.data.rejects import Rejected
from pipelines.data.sources import Record

LENGTH = 64


class Model:
    """What the loader needs of a model configuration."""

    def build_collator(self, sequence_length, pad_mode, include_metadata=True):
        return MMCollator(sequence_length, pad_mode, include_metadata)


class Numbers:
    """Records that are numbers."""

    def __init__(self, n, name="numbers"):
        self.n, self.name = n, name

    def __len__(self):
        return self.n

    def where(self, i):
        return self.name, i

    def __getitem__(self, i):
        return Record(self.name, i, {"n": i})


class Maker:
    """Some tokens, and crops for two of three; every seventh record is unusable."""

    def example(self, record, counts=None):
        return record

    def build(self, record, rng):
        return make_example(record, rng)


def make_example(record, rng):
    n = record.data["n"]
    if n % 7 == 6:
        raise Rejected("record: a seventh", "test")
    ids = rng.randint(0, 1000, rng.randint(5, 40)).astype(np.int64)
    example = {
        "input_ids": ids,
        "labels": ids + 1,
        "loss_masks": rng.rand(len(ids)).astype(np.float32),
        "position_ids": np.arange(len(ids)),
    }
    if n % 3:
        example["images"] = rng.randint(0, 256, (rng.randint(1, 4), 4, 12)).astype(np.uint8)
        example["pooled_patches_idx"] = np.arange(4).reshape(2, 2)
    return example | {"metadata": {}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two prepared datasets, of 43 and 26 examples."""
    made = []
    for n, size in (("a", 50), ("b", 30)):
        folder = tmp_path_factory.mktemp(n)
        shards = range(-(-size // 8))
        done = {k: write_shard(folder, k, range(k * 8, min(size, k * 8 + 8)), Numbers(size), Maker(), 0) for k in shards}
        report = close(folder, done, size, None, {}, size, 1.0, held_out=0)
        assert report["rows_rejected"] == size // 7
        made.append(folder)
    return made


def data(folders, **settings) -> DataConfig:
    groups = {name: {"weight": w, "datasets": {name: {"path": str(f)}}} for name, w, f in zip("ab", (3, 1), folders)}
    return DataConfig.from_dict({"groups": groups, "pad_to_max": True, **settings})


def loader(config, rank=0, world=1, batch=6, seed=5):
    return TrainLoader(config, Model(), batch, LENGTH, seed, rank, world)


def digest(rows) -> str:
    """Hash of what the model sees of rows of a batch: padding of media (to the largest of a batch) does not count."""
    parts = []
    for batch in rows:
        for i in range(len(batch["input_ids"])):
            row = {key: batch[key][i].numpy() for key in batch}
            for key, empty in (("images", 0), ("pooled_patches_idx", -1)):
                if key in row:
                    used = np.flatnonzero((row[key] != empty).reshape(len(row[key]), -1).any(1))
                    row[key] = row[key][: used[-1] + 1 if len(used) else 0]
            parts += [
                f"{k}{v.shape if v.size else 0}".encode() + v.tobytes() for k, v in sorted(row.items()) if v.size and k != "subsegment_ids"
            ]
    return hashlib.sha256(b"".join(parts)).hexdigest()


PACKING = {"packing": {"buffer_size": 8, "max_crops": 5}}


@pytest.mark.parametrize("settings", [{}, PACKING, {"shuffle": False}], ids=["single", "packed", "in order"])
def test_twenty_stops_on_one_two_three_workers(folders, settings):
    """The run is stopped at 20 random places and continued on another number of workers: exactly the same batches remain."""
    config = data(folders, **settings)
    steps = 80
    whole = iter(loader(config))
    expected = [digest([next(whole)]) for _ in range(steps)]
    assert len(set(expected)) == steps
    stops = sorted(random.Random(0).sample(range(1, steps), 20))
    found, merged = [], None
    for part, (start, stop) in enumerate(zip([0, *stops], [*stops, steps])):
        world = 1 + part % 3
        ranks = [loader(config, rank, world) for rank in range(world)]
        for rank in ranks:
            if merged is not None:
                rank.load_state_dict(merged)
        batches = [iter(rank) for rank in ranks]
        found += [digest([next(batch) for batch in batches]) for _ in range(stop - start)]
        merged = {s: ints for rank in ranks for s, ints in rank.state_dict().items()}
        assert sorted(merged) == list(range(6))
        assert all(isinstance(i, int) for ints in merged.values() for i in ints)
    assert found == expected


def test_state_before_the_first_batch_is_the_beginning(folders):
    first = loader(data(folders))
    state = first.state_dict()
    expected = digest([next(iter(first))])
    again = loader(data(folders))
    again.load_state_dict(state)
    assert digest([next(iter(again))]) == expected
    again.load_state_dict(state)
    assert digest([next(iter(again))]) == expected, "iter after load_state_dict starts there"


def test_packs_keep_to_both_budgets(folders):
    config = data(folders, **PACKING)
    made = loader(config)
    tokens = []
    for batch, _ in zip(made, range(60)):
        used = (batch["input_ids"] >= 0).sum(1)
        assert used.max() <= LENGTH
        assert batch["images"].shape[1] <= 5
        tokens += used.tolist()
    assert np.mean(tokens[60:]) > 0.9 * LENGTH, "packs are not filled"


def test_message_weight_replaces_the_weights(folders):
    example = PackBuilder([Prepared(PreparedDataset(folders[0]), 0.2)])([Draw(0, 1, 0)]).example
    assert set(np.unique(example["loss_masks"])) <= {np.float32(0), np.float32(0.2)}


def test_message_weight_of_records_multiplies_theirs(golden, tmp_path):
    model = BaseModelConfig.load(golden / "molmo-qwen2-siglip-bidir" / "config.yaml")
    qa = {"style": "demo", "question": "What is it?", "answer": "A cat."}
    tree = {"message_list": [qa, {**qa, "weight": 0.5}, qa]}
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (qa, tree)))
    config = DataConfig.from_dict({"datasets": {"x": {"path": str(tmp_path / "x.jsonl"), "message_weight": 0.2}}})
    rows = TrainLoader(config, model, 2, LENGTH, 0, 0, 1).examples(2)
    found = {float(weight) for row in rows for weight in np.unique(row["loss_masks"])}
    assert found == {0.0, float(np.float32(0.1)), float(np.float32(0.2))}, "not divided by the root of three annotations"


@pytest.mark.parametrize(
    ("given", "frames"),
    [({}, 6), ({"max_frames": 4}, 4), ({"max_frames": 2, "frame_sample_mode": "uniform"}, 2), ({"pooling_h": 1, "pooling_w": 1}, 6)],
)
def test_overrides_of_a_dataset_reach_its_frames(golden, tmp_path, given, frames):
    """VideoOlmo's `max_frames` may stand at the top of the model's configuration, too; a dataset's override wins."""
    base = BaseModelConfig.load(golden / "video-olmo" / "per-frame" / "config.yaml", ["mm_preprocessor.frame_sample_mode=uniform"])
    for model in (base, type(base).from_dict(base.as_dict())):  # settings inside mm_preprocessor, and at the top
        row = {"video": str(golden / "video-olmo" / "video.mp4"), "style": "demo", "question": "What is it?", "answer": "A square."}
        (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
        config = DataConfig.from_dict({"datasets": {"x": {"path": str(tmp_path / "x.jsonl"), "overrides": given}}})
        (example,) = TrainLoader(config, model, 1, 4096, 0, 0, 1).examples(1)
        assert len(example["images"]) == frames
        assert model.max_frames == 6, "the model's own configuration stays"


def test_mistakes_are_named(folders, tmp_path):
    with pytest.raises(ConfigError, match="9 workers for a global batch of 6"):
        loader(data(folders), 0, 9)
    with pytest.raises(ConfigError, match=r"examples are longer than sequence_length=16.*prepare them with"):
        TrainLoader(data(folders), Model(), 6, 16, 0, 0, 1)
    with pytest.raises(ConfigError, match=r"examples have more crops or frames than packing.max_crops=1 \(most 3\)"):
        loader(data(folders, packing={"max_crops": 1}))
    with pytest.raises(ConfigError, match="no such file or folder"):
        loader(DataConfig.from_dict({"datasets": {"x": {"path": str(tmp_path / "nothing")}}}))
    (tmp_path / "prepare.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not finished"):
        loader(DataConfig.from_dict({"datasets": {"x": {"path": str(tmp_path)}}}))
    with pytest.raises(ConfigError, match=r"no data state of streams \[3, 4, 5\]"):
        loader(data(folders), 1, 2).load_state_dict(loader(data(folders), 0, 2).state_dict())
    with pytest.raises(ConfigError, match="of other data, or of another"):
        loader(data(folders)).load_state_dict(loader(data(folders), seed=6).state_dict())


def test_prefetch_passes_errors_on_and_ends():
    def items():
        yield 1
        raise ValueError("boom")

    made = prefetched(items(), 2)
    assert next(made) == 1
    with pytest.raises(ValueError, match="boom"):
        next(made)
    before = threading.active_count()
    endless = prefetched(iter(int, 1), 2)
    assert next(endless) == 0
    endless.close()
    assert threading.active_count() == before
    assert list(prefetched(iter(range(5)), 2)) == list(range(5))
