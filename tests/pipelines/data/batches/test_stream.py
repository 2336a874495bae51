"""Streamed training data: Ray Data gives the plan's rows in the plan's order, and a bad record costs one example, not the run."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pyarrow as pa
import pytest
import ray

from jobs.inventory import main as take_inventory
from molmo_core.config import ConfigError
from molmo_core.models.base import BaseModelConfig
from pipelines.cluster import connect
from pipelines.data.batches import endless
from pipelines.data.batches.loader import TrainLoader
from pipelines.data.batches.packs import PackBuilder
from pipelines.data.batches.plan import Stream
from pipelines.data.batches.stream import (
    _CALL_PACKS,
    _LARGE_ARRAYS,
    BatchActor,
    PlanSource,
    _block,
    _blocks,
    _unpack,
    stream_batches,
)
from pipelines.data.config import DataConfig

pytestmark = pytest.mark.slow


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
    streams = made._streams().values()
    return [made.collate([made.builder(stream.next()).example for stream in streams]) for _ in range(steps)]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


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


def test_a_new_pipeline_goes_on_where_the_last_one_stopped(cluster, model, good_records, monkeypatch):
    monkeypatch.setattr("pipelines.data.batches.stream._PIPELINE_BLOCKS", 1)  # of eight steps of four packs
    started = []
    monkeypatch.setattr("pipelines.data.batches.stream._blocks", lambda *given: started.append(1) or _blocks(*given))
    made = loader(DataConfig.from_dict({"datasets": {"x": {"path": str(good_records)}}, "actors": 1}), model)
    batches = iter(made)
    found = list(itertools.islice(batches, 20))
    batches.close()
    assert len(started) >= 3
    assert [same(a, b) for a, b in zip(found, local(made, 20), strict=True)] == [True] * 20


def test_ray_data_keeps_nothing_of_blocks_that_are_done(cluster, model, good_records, monkeypatch):
    kept, forget = [], endless.forget

    def counted(op):
        queue = op._output_queue
        kept.append(max(len(op._output_blocks_stats), len(getattr(queue, "_inner", ())), len(getattr(queue, "_finalized_keys", ()))))
        forget(op)

    monkeypatch.setattr(endless, "forget", counted)
    made = loader(DataConfig.from_dict({"datasets": {"x": {"path": str(good_records)}}, "actors": 1}), model)
    batches = iter(made)
    for _ in range(320):  # 40 blocks of eight steps
        next(batches)
    batches.close()
    assert 0 < max(kept) < 25


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
    assert ahead < 28 * _CALL_PACKS, "eight rows that wait for the actor, eight in the generator, and what the actor and this process hold"


def test_two_ranks_share_the_global_batch(cluster, model, good_records):
    data = DataConfig.from_dict({"datasets": {"x": {"path": str(good_records)}}, "pad_to_max": True, "actors": 1})
    (whole,) = local(loader(data, model), 1)
    parts = []
    for rank in range(2):
        batches = iter(loader(data, model, rank, 2))
        parts.append(next(batches))
        batches.close()
    np.testing.assert_array_equal(np.concatenate([p["input_ids"] for p in parts]), whole["input_ids"])


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
def test_batches_are_the_same_however_their_steps_are_cut(cluster, model, good_records, monkeypatch, call_packs, block_bytes):
    monkeypatch.setattr("pipelines.data.batches.stream._CALL_PACKS", call_packs)
    monkeypatch.setattr("pipelines.data.batches.stream._BLOCK_BYTES", block_bytes)
    made = loader(DataConfig.from_dict({"datasets": {"x": {"path": str(good_records)}}}), model)
    (task,) = PlanSource(made._streams()).get_read_tasks(1)
    actor = BatchActor([ray.put(made.builder)], made.collate)
    parts, found = [], []
    for part, *_, states in itertools.chain.from_iterable(map(_unpack, itertools.chain.from_iterable(map(actor, task.read_fn())))):
        parts.append(part)
        if states is not None:
            found.append(made.collate.join(parts))
            parts = []
            if len(found) == 16:
                break
    assert [same(a, b) for a, b in zip(found, local(made, 16), strict=True)] == [True] * 16


def test_blocks_give_back_what_they_were_made_of():
    large = np.random.RandomState(0).randint(0, 255, (2, 3000, 200), np.uint8)
    batches = [{"images": large, "input_ids": np.arange(3)}, {"images": large[:, ::2], "image_masks": np.zeros((0, 4), np.float32)}, {}]
    batches += [{"images": large[i % 2 :]} for i in range(_LARGE_ARRAYS)]
    made = [(batch, {"a": i}, [("a", i, "r", "d")], str(i)) for i, batch in enumerate(batches)]
    table = pa.concat_tables([_block(made), _block(made[:1]), _block(made[1:])])
    for block in (table.slice(1), table.combine_chunks().slice(1)):
        for (batch, *rest), (expected, *others) in zip(_unpack(block), made, strict=True):
            assert rest == others
            assert same(batch, expected)
            assert [a.dtype for a in batch.values()] == [a.dtype for a in expected.values()]
