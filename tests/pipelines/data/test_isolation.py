"""A video that crashes or hangs its decoder costs one record, not the run."""

from __future__ import annotations

import os
import sys
import time

import numpy as np
import pytest
import ray

from pipelines.cluster import connect
from pipelines.data.builder import ExampleBuilder
from pipelines.data.isolation import IsolatedBuilder
from pipelines.data.sources import Record, Rejected

pytestmark = pytest.mark.slow


class Preprocessor:
    """Does to its process what the question says, and gives the process's number."""

    def __call__(self, example, rng):
        match example["question"]:
            case "crash":
                os._exit(11)
            case "hang":
                time.sleep(600)
            case "fail":
                raise ValueError("no such thing")
        return {"input_ids": np.array([os.getpid()]), "loss_masks": np.ones(1, np.float32)}


@pytest.fixture(scope="module")
def cluster():
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
    with connect(num_cpus=2, object_store_memory=256 << 20):
        yield


def test_decoder_crashes_hangs_and_leaks(cluster, golden):
    builder = IsolatedBuilder(ExampleBuilder(Preprocessor(), 10**6), timeout_s=60, videos_per_process=3)
    video = str(golden / "video-olmo" / "video.mp4")

    def make(question, **fields):
        return int(builder(Record("x.jsonl", 0, {"question": question, "answer": "a", **fields}), None)["input_ids"][0])

    assert make("text") == os.getpid(), "only videos are isolated"
    first = make("ok", video=video)
    assert first != os.getpid()
    with pytest.raises(Rejected, match=r"video: crashes the decoder: .*video.mp4: the process died 2 times"):
        make("crash", video=video)
    processes = [make("ok", video=video) for _ in range(7)]
    assert len(set(processes)) == 3, "a process decodes three videos"
    assert first not in processes
    with pytest.raises(Rejected, match="cannot be preprocessed: ValueError: no such thing"):
        make("fail", video=video)
    builder.timeout_s = 1
    with pytest.raises(Rejected, match="takes too long"):
        make("hang", video=video)
    builder.timeout_s = 60
    assert make("ok", video=video) not in processes
