"""The pool of decoders: what crashes or hangs costs its request only; the queue ends; who leaves it gives up the place."""

import asyncio
import io
import os
import random
import signal

import numpy as np
import pytest
from PIL import Image

from molmo_core.registry import BaseModelConfig
from pipelines.serving.errors import ApiError
from pipelines.serving.media import pool as pool_module
from pipelines.serving.media.features import Limits, Task, Unusable, media_features
from pipelines.serving.media.pool import MediaPool


def scripted(task):
    """In a worker: does to its process what the data say."""
    match task.data.split():
        case [b"crash"]:
            os.kill(os.getpid(), signal.SIGSEGV)
        case [b"hang"]:
            signal.pause()
        case [b"memory"]:
            try:
                np.ones(pool_module.MEMORY, np.uint8)
            except MemoryError:
                return Unusable("invalid_image", "memory")
        case [b"wait", fifo]:
            with open(fifo, "rb") as file:
                file.read()
        case [b"who"]:
            return os.getpid()
        case [b"nice"]:
            return os.nice(0)
    return media_features(task)


@pytest.fixture
def pool(monkeypatch):
    """`pool(**settings)`: a pool whose workers are scripted."""
    monkeypatch.setattr(pool_module, "media_features", scripted)
    made = []

    def build(workers=2, places=8, timeout_s=60.0):
        made.append(MediaPool(workers, places, timeout_s))
        return made[-1]

    yield build
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def task(golden_config):
    settings = golden_config.build_preprocessor(for_inference=True, is_training=False).image_settings(1)
    return lambda data: Task(data, False, settings, None, Limits(1 << 20, 10**6, 1, 1))


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (70, 90, 3), np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def test_features_are_those_of_this_process(pool, task):
    run = pool()
    remote, here = asyncio.run(run(task(picture()))), media_features(task(picture()))
    np.testing.assert_array_equal(remote.images, here.images)
    np.testing.assert_array_equal(remote.pooled_patches_idx, here.pooled_patches_idx)
    assert (remote.size, remote.grids, remote.images.dtype) == (here.size, here.grids, np.uint8)
    assert asyncio.run(run(task(b"who"))) != os.getpid()
    assert asyncio.run(run(task(b"nice"))) == pool_module.NICENESS
    assert asyncio.run(run(task(b"memory"))) == Unusable("invalid_image", "memory")


def test_a_crash_costs_its_request_only(pool, task):
    run = pool()

    async def all_of(*data):
        return await asyncio.gather(*(run(task(each)) for each in data))

    results = asyncio.run(all_of(picture(), b"crash", picture(), picture(), b"crash", picture(), picture()))
    assert [type(result) is Unusable for result in results] == [False, True, False, False, True, False, False]
    assert results[1] == Unusable("invalid_image", "it crashes the decoder (SIGSEGV)")


def test_a_worker_that_was_killed_costs_nothing(pool, task):
    """As the kernel does when memory is short."""
    run = pool(workers=1)
    before = asyncio.run(run(task(b"who")))
    os.kill(before, signal.SIGKILL)
    assert asyncio.run(run(task(picture()))).size == (90, 70)
    assert asyncio.run(run(task(b"who"))) != before


def test_a_decoder_that_hangs(pool, task):
    run = pool(workers=1, timeout_s=2)
    asyncio.run(run(task(picture())))
    assert asyncio.run(run(task(b"hang"))) == Unusable("invalid_image", "it takes more than 2 s to decode")
    assert asyncio.run(run(task(picture()))).size == (90, 70)


def test_workers_are_replaced(pool, task, monkeypatch):
    monkeypatch.setattr(pool_module, "TASKS_PER_PROCESS", 2)
    run = pool(workers=1)
    workers = [asyncio.run(run(task(b"who"))) for _ in range(4)]
    assert workers[0] == workers[1] != workers[2] == workers[3]


def test_a_full_queue_and_who_leaves_it(pool, task, tmp_path):
    run = pool(workers=1, places=2)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    async def scenario():
        working = asyncio.create_task(run(task(b"wait " + os.fsencode(fifo))))
        writer = await asyncio.to_thread(open, fifo, "wb")  # opens when the worker reads: it is in work
        waiting = asyncio.create_task(run(task(b"crash")))
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as caught:
            await run(task(picture()))
        assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "1"})
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        later = asyncio.create_task(run(task(b"who")))
        await asyncio.sleep(0)
        writer.close()
        assert type(await working) is Unusable
        return await later, await run(task(b"who"))

    before, after = asyncio.run(scenario())
    assert before == after, "the one that left never ran"


def test_broken_videos(golden):
    """Bytes changed and cut off: features or a reason, whatever becomes of the decoders."""
    model = BaseModelConfig.load(golden / "video-olmo/per-frame/config.yaml").build_preprocessor(for_inference=True)
    file = (golden / "video-olmo" / "video.mp4").read_bytes()
    draw = random.Random(0)
    files = [file]
    for _ in range(60):
        broken = bytearray(file[: draw.randint(1, len(file))] if draw.random() < 0.2 else file)
        for _ in range(draw.choice([1, 4, 60])):
            broken[draw.randrange(len(broken))] = draw.randrange(256)
        files.append(bytes(broken))
    limits = Limits(1 << 20, 10**6, 10_000, 600)
    run = MediaPool(2, len(files), 20)

    async def all_of():
        return await asyncio.gather(*(run(Task(each, False, model.settings, model.frame_settings, limits)) for each in files))

    try:
        results = asyncio.run(all_of())
    finally:
        run.close()
    assert results[0].size == (96, 64)
    reasons = [result for result in results if isinstance(result, Unusable)]
    assert {result.code for result in reasons} == {"invalid_video"}
    assert 5 < len(reasons) < len(files)
