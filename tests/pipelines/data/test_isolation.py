"""A video that crashes or hangs its decoder costs one record, not the run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import numpy as np
import psutil
import pytest

from pipelines.data.builder import ExampleBuilder
from pipelines.data.isolation import IsolatedBuilder
from pipelines.data.rejects import Rejected
from pipelines.data.sources import Record


class Preprocessor:
    """Does to its process what the question says, and gives the process's number and some pixels."""

    def __call__(self, example, rng):
        match example["question"].split():
            case ["crash"]:
                os.kill(os.getpid(), signal.SIGSEGV)
            case ["hang"]:
                time.sleep(600)
            case ["fail"]:
                raise ValueError("no such thing")
            case ["pixels", size]:
                images = np.arange(int(size), dtype=np.uint8).reshape(2, -1)
                return {"input_ids": np.array([os.getpid()]), "loss_masks": np.ones(1, np.float32), "images": images}
        return {"input_ids": np.array([os.getpid()]), "loss_masks": np.ones(1, np.float32)}


class Numbered(Preprocessor):
    """Gives a number of its own, too."""

    def __init__(self, number):
        self.number = number

    def __call__(self, example, rng):
        return super().__call__(example, rng) | {"labels": np.array([self.number])}


@pytest.fixture
def isolated(golden):
    builder = IsolatedBuilder(ExampleBuilder(Preprocessor(), 10**6), timeout_s=60, videos_per_process=3)
    yield builder
    builder.close()


@pytest.fixture
def video(golden):
    return str(golden / "video-olmo" / "video.mp4")


def example(builder, question, **fields):
    return builder(Record("x.jsonl", 0, {"question": question, "answer": "a", **fields}), None)


def process(builder, question, **fields):
    return int(example(builder, question, **fields)["input_ids"][0])


def test_decoder_crashes_hangs_and_leaks(isolated, video):
    assert process(isolated, "text") == os.getpid(), "only videos are isolated"
    first = process(isolated, "ok", video=video)
    assert first != os.getpid()
    with pytest.raises(Rejected, match=r"video: crashes the decoder: .*video.mp4: the process died 2 times \(SIGSEGV\)"):
        example(isolated, "crash", video=video)
    processes = [process(isolated, "ok", video=video) for _ in range(7)]
    assert len(set(processes)) == 3, "a process decodes three videos"
    assert first not in processes
    with pytest.raises(Rejected, match="cannot be preprocessed: ValueError: no such thing"):
        example(isolated, "fail", video=video)
    isolated.decoder.timeout_s = 1
    with pytest.raises(Rejected, match="takes too long"):
        example(isolated, "hang", video=video)
    isolated.decoder.timeout_s = 60
    assert process(isolated, "ok", video=video) not in processes
    isolated.close()
    assert not multiprocessing.active_children()


def test_pixels_come_back_whole_and_belong_to_the_caller(isolated, video):
    sizes = [2 << 20, 2 << 10, 8 << 20, 0, 4 << 20]  # memory grows, is used again, and is not needed
    isolated.decoder.videos_per_process = len(sizes)
    made = [example(isolated, f"pixels {size}", video=video)["images"] for size in sizes]
    for images, size in zip(made, sizes, strict=True):
        np.testing.assert_array_equal(images, np.arange(size, dtype=np.uint8).reshape(2, -1))
        assert images.flags.writeable


def test_lent_pixels_stay_until_they_are_released(isolated, video):
    isolated.decoder.lend, isolated.decoder.videos_per_process = True, 4  # the last of them are lent by another process
    sizes = [1 << 20, 3 << 20, 0, 6 << 20, 2 << 10, 5 << 20]
    made = [example(isolated, f"pixels {size}", video=video)["images"] for size in sizes]
    for images, size in zip(made, sizes, strict=True):
        np.testing.assert_array_equal(images, np.arange(size, dtype=np.uint8).reshape(2, -1))
        assert not images.flags.writeable or not size
    lent = isolated.decoder.lent
    assert lent > 5 << 20
    isolated.release()
    again = example(isolated, "pixels 4096", video=video)["images"]
    np.testing.assert_array_equal(again, np.arange(4096, dtype=np.uint8).reshape(2, -1))
    assert isolated.decoder.lent < 8192, "the place is used again"


def test_builders_share_a_process(video):
    shared = IsolatedBuilder.sharing([ExampleBuilder(preprocessor, 10**6) for preprocessor in map(Numbered, range(3))])
    made = [example(builder, "ok", video=video) for builder in (*shared, *shared)]
    assert len({int(one["input_ids"][0]) for one in made}) == 1
    assert [int(one["labels"][0]) for one in made] == [0, 1, 2, 0, 1, 2]
    shared[1].close()
    assert not multiprocessing.active_children()


def _hang(ready, video):
    builder = IsolatedBuilder(ExampleBuilder(Preprocessor(), 10**6))
    ready.put(process(builder, "ok", video=video))
    example(builder, "hang", video=video)


def test_the_process_ends_when_its_parent_is_killed(video):
    context = multiprocessing.get_context("spawn")
    ready = context.Queue()
    parent = context.Process(target=_hang, args=(ready, video))
    parent.start()
    helper = psutil.Process(ready.get(timeout=60))
    parent.kill()
    parent.join()
    helper.wait(timeout=30)
