"""Streamed training data: Ray Data gives the plan's rows in the plan's order, and a bad record costs one example, not the run."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from jobs.inventory import main as take_inventory
from molmo_core.config import ConfigError
from molmo_core.models.base import BaseModelConfig
from molmo_core.preprocessing.collator import tensors
from pipelines.cluster import connect
from pipelines.data.batches import blocks, endless, ray_internals
from pipelines.data.batches.loader import TrainLoader
from pipelines.data.batches.packs import PackBuilder
from pipelines.data.batches.plan import Stream
from pipelines.data.batches.stream import BatchMaker, PlanSource, Sizes, stream_batches
from pipelines.data.config import DataConfig


def slow(test):
    """Some of these look how far ahead a pipeline reads: no other test runs beside them."""
    return pytest.mark.alone(pytest.mark.slow(test))


@pytest.fixture(scope="module")
def cluster():
    with connect(num_cpus=2, object_store_memory=256 << 20):
        yield


@pytest.fixture
def model(golden):
    return BaseModelConfig.load(golden / "molmo-qwen2-siglip-bidir" / "config.yaml")


def loader(data, model, rank=0, world=1):
    return TrainLoader(data, model, global_batch_size=4, sequence_length=512, seed=1, rank=rank, world_size=world)


def local(made: TrainLoader, steps: int) -> list:
    """The loader's first batches, made in this process."""
    streams = made.streams().values()
    return [made.collate([made.builder(stream.next()).example for stream in streams]) for _ in range(steps)]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@slow
@pytest.mark.parametrize("packing", [None, {"buffer_size": 8, "max_crops": 8}], ids=["single", "packed"])
def test_rows_come_in_the_plans_order_and_resume(cluster, model, good_records, packing, tmp_path):
    data = DataConfig.from_dict({"datasets": {"x": {"path": str(good_records)}}, "packing": packing, "actors": 2})
    if packing:
        data.save(tmp_path / "data.yaml")
        take_inventory(tmp_path / "data.yaml")
    expected = local(loader(data, model), 12)
    first = loader(data, model)
    batches = iter(first)
    found = list(itertools.islice(batches, 5))
    state = first.state_dict()
    batches.close()
    again = loader(data, model)
    again.load_state_dict(state)
    batches = iter(again)
    found += list(itertools.islice(batches, 7))
    batches.close()
    assert [same(a, b) for a, b in zip(found, expected, strict=True)] == [True] * 12


def streamed(made: TrainLoader, steps: int, sizes: Sizes) -> list:
    """The loader's first batches, made by actors."""
    batches = stream_batches(made.streams(), made.builder, made.collate, ranks=1, actors=1, max_reject_rate=0, sizes=sizes)
    found = [batch for batch, _ in itertools.islice(batches, steps)]
    batches.close()
    return found


@slow
def test_a_new_pipeline_takes_over_where_the_last_one_ended(cluster, model, good_records, monkeypatch):
    started, read = [], endless.read
    monkeypatch.setattr(endless, "read", lambda *given: started.append(1) or read(*given))
    made = loader(DataConfig.from_dict({"datasets": {"x": {"path": str(good_records)}}}), model)
    found = streamed(made, 20, Sizes(call_packs=12, pipeline_calls=3))  # nine steps of four packs
    assert len(started) == 3
    assert [same(a, tensors(b)) for a, b in zip(local(made, 20), found, strict=True)] == [True] * 20


@slow
def test_plain_ray_data_gives_the_same_batches(cluster, model, good_records, monkeypatch):
    monkeypatch.setattr(endless, "internals", lambda: None)
    made = loader(DataConfig.from_dict({"datasets": {"x": {"path": str(good_records)}}}), model)
    found = streamed(made, 20, Sizes(pipeline_calls=2))
    assert [same(a, tensors(b)) for a, b in zip(local(made, 20), found, strict=True)] == [True] * 20


@slow
def test_ray_data_keeps_nothing_of_blocks_that_are_done(cluster, model, good_records, monkeypatch):
    kept, forget = [], ray_internals.forget

    def counted(op):
        queue = op._output_queue
        kept.append(max(len(op._output_blocks_stats), len(getattr(queue, "_inner", ())), len(getattr(queue, "_finalized_keys", ()))))
        forget(op)

    monkeypatch.setattr(ray_internals, "forget", counted)
    made = loader(DataConfig.from_dict({"datasets": {"x": {"path": str(good_records)}}, "actors": 1}), model)
    batches = iter(made)
    for _ in range(240):  # 30 blocks of eight steps
        next(batches)
    batches.close()
    assert 0 < max(kept) < 25


@slow
def test_the_plan_is_not_read_ahead_without_end(cluster, model, good_records, tmp_path):
    planned = tmp_path / "planned"

    class Counted(Stream):  # here, so that it is pickled whole
        def next(self):
            with open(planned, "ab") as file:
                file.write(b".")
            return super().next()

    class Slow(PackBuilder):
        def rows(self, packs, pool=None):
            for row in super().rows(packs, pool):
                time.sleep(0.03)
                yield row

    made = loader(DataConfig.from_dict({"datasets": {"x": {"path": str(good_records)}}, "actors": 1}), model)
    streams = {s: Counted(made.plan, s) for s in made.owned}
    slow = Slow(made.builder.datasets)
    batches = stream_batches(streams, slow, made.collate, ranks=1, actors=1, max_reject_rate=0)
    for _ in range(40):
        next(batches)
    batches.close()
    ahead = planned.stat().st_size - 40 * len(streams)
    assert ahead < 28 * Sizes().call_packs, (
        "eight rows that wait for the actor, eight in the generator, and what the actor and this process hold"
    )


@slow
def test_two_ranks_share_the_global_batch(cluster, model, good_records):
    data = DataConfig.from_dict({"datasets": {"x": {"path": str(good_records)}}, "pad_to_max": True, "actors": 1})
    (whole,) = local(loader(data, model), 1)
    parts = []
    for rank in range(2):
        batches = iter(loader(data, model, rank, 2))
        parts.append(next(batches))
        batches.close()
    np.testing.assert_array_equal(np.concatenate([p["input_ids"] for p in parts]), whole["input_ids"])


@slow
def test_bad_records_cost_one_example_until_there_are_too_many(cluster, model, good_records, make):
    rows = [make.chat("0.png"), make.chat("missing.png"), make.chat("1.png")]
    path = make.write_jsonl(good_records.parent / "some.jsonl", rows)
    settings = {"datasets": {"x": {"path": str(path)}}, "shuffle": False, "actors": 1}
    batches = iter(loader(DataConfig.from_dict({**settings, "max_reject_rate": 1.0}), model))
    batch = next(batches)
    batches.close()
    weights = batch["loss_masks"].sum(1)
    assert [bool(w > 0) for w in weights] == [True, False, True, True], "the unusable record's row has no loss"
    batches = iter(loader(DataConfig.from_dict({**settings, "max_reject_rate": 0.05}), model))
    with pytest.raises(
        ConfigError, match=r"some.jsonl: \d+ of \d+ records rejected.* data.max_reject_rate=0.05 .* is row 1: media: missing file"
    ):
        list(itertools.islice(batches, 100))


@pytest.mark.parametrize(("call_packs", "block_bytes"), [(3, 48 << 20), (5, 1), (32, 3 << 20), (32, 48 << 20)])
def test_batches_are_the_same_however_their_steps_are_cut(model, good_records, call_packs, block_bytes):
    sizes = Sizes(call_packs, block_bytes, pipeline_calls=64 // call_packs)
    made = loader(DataConfig.from_dict({"datasets": {"x": {"path": str(good_records)}}}), model)
    actor = BatchMaker(made.builder, made.collate, sizes)
    parts, found = [], []
    for table in itertools.chain.from_iterable(map(actor, PlanSource(made.streams(), sizes).rows())):
        for part in blocks.read(table.combine_chunks()):
            parts.append({name: array.copy() for name, array in part.arrays.items()})  # the next but one block takes their place
            if part.states is not None:
                found.append(made.collate.join(parts))
                parts = []
    assert not parts, "the last row ends a step"
    assert len(found) >= 16
    assert [same(a, tensors(b)) for a, b in zip(local(made, len(found)), found, strict=True)] == [True] * len(found)
