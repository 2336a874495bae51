"""Decoding and preprocessing: a bare loop on every core, torch's DataLoader, and the Ray Data pipeline, on the same files in one run.

    .venv/bin/python benchmarks/data_pipeline.py                    # JPEGs and video clips
    .venv/bin/python benchmarks/data_pipeline.py --soak 20          # 20 minutes of streaming: does memory stay flat?

The images are photographs (scikit-image) cropped to 1024 x 768, the videos 10 s of 640 x 360 h264; the model is Molmo2's
preprocessor (378-pixel crops, up to 8; videos: 16 frames). Rates are those of the steady state: from the first batch to the
last, so that start-up (a few seconds for Ray Data) does not count; `all` is from the call to the last batch. Memory is the
largest sum of the processes' proportional set sizes, Ray's own processes included.
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import argparse  # noqa: E402
import concurrent.futures  # noqa: E402
import importlib.metadata  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import multiprocessing  # noqa: E402
import platform  # noqa: E402
import tempfile  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import psutil  # noqa: E402
from PIL import Image  # noqa: E402

from molmo_core.models.base import BaseModelConfig  # noqa: E402
from pipelines.data.builder import ExampleBuilder, example_rng  # noqa: E402
from pipelines.data.config import DataConfig  # noqa: E402
from pipelines.data.loader import TrainLoader  # noqa: E402
from pipelines.data.sources import Records, open_records  # noqa: E402
from pipelines.data.tokenizer import train_tokenizer  # noqa: E402

BATCH, LENGTH = 8, 4096
MODEL = "configs/models/molmo2-4b.yaml"


def main() -> None:
    """Makes the files, runs the three ways in turn, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--videos", type=int, default=96)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--soak", type=float, default=0, help="minutes of streaming images, instead of the comparison")
    arguments = parser.parse_args()
    packages = ("ray", "torch", "pillow", "decord", "numpy")
    print(f"{platform.processor() or platform.machine()}, {arguments.cores} cores; ", end="")
    print(", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder)
        if arguments.soak:
            soak(write_images(folder, 200), model, arguments.cores, arguments.soak)
            return
        for kind, path, count in (
            ("JPEG 1024x768", write_images(folder, arguments.images), arguments.images),
            ("video, 16 frames", write_videos(folder, arguments.videos), arguments.videos),
        ):
            compare(kind, path, model, arguments.cores, count, arguments.rounds)


def compare(kind: str, path: Path, model: Any, cores: int, count: int, rounds: int) -> None:
    """One table: the three ways on the same records."""
    ways: dict[str, Callable[[], tuple[int, float, float]]] = {
        "bare loop": lambda: bare_loop(path, model, cores),
        "DataLoader": lambda: consume(lambda: data_loader(path, model, cores), count // BATCH),
        "Ray Data": lambda: on_ray(lambda: consume(lambda: ray_data(path, model, cores), count // BATCH), cores),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    print(f"\n{kind}: {count} records\n{'':12}{'records/s':>10}{'all':>8}{'memory':>10}")
    for _ in range(rounds):
        for name, way in ways.items():
            with PeakMemory() as memory:
                done, steady, total = way()
            found[name].append(done / steady)
            print(f"{name:12}{done / steady:10.1f}{done / total:8.1f}{memory.peak / 2**20:8.0f} MiB", flush=True)
    bare, loader, ours = (float(np.median(rates)) for rates in found.values())
    print(
        f"Ray Data / bare loop = {ours / bare:.3f} (must be >= 0.85), Ray Data / DataLoader = {ours / loader:.3f} (must be >= 1.0)",
        flush=True,
    )


def make_model(folder: Path) -> Any:
    """Molmo2's configuration with a small tokenizer, so that nothing is downloaded."""
    train_tokenizer(["What is in the picture? It is number 0123456789."], 400, folder / "tokenizer")
    overrides = [f"llm.tokenizer.identifier={folder / 'tokenizer'}", "data_formatter.message_format=role", "mm_preprocessor.max_frames=16"]
    return BaseModelConfig.load(MODEL, overrides)


def write_images(folder: Path, count: int) -> Path:
    """Photographs of different contents and the same size, and their records."""
    import skimage.data

    photos = [Image.fromarray(getattr(skimage.data, name)()) for name in ("astronaut", "chelsea", "coffee", "rocket")]
    rows = []
    for i in range(count):
        photo = photos[i % len(photos)]
        left, top = (i * 7) % 40, (i * 3) % 30
        photo.crop((left, top, photo.width - 40 + left, photo.height - 30 + top)).resize((1024, 768)).save(folder / f"{i}.jpg", quality=90)
        rows.append({"image": f"{i}.jpg", "messages": ["What is in the picture?", f"It is number {i}."]})
    return _write(folder / "images.jsonl", rows)


def write_videos(folder: Path, count: int) -> Path:
    """Clips that pan over a photograph, 10 s at 25 frames a second, and their records (8 files, each used several times)."""
    import av
    import skimage.data

    photo = np.asarray(Image.fromarray(skimage.data.astronaut()).resize((1280, 720)))
    for k in range(8):
        with av.open(str(folder / f"{k}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=25, width=640, height=360, pix_fmt="yuv420p", options={"g": "50"})
            for t in range(250):
                x, y = (t * (k + 1)) % 640, (t * 2) % 360
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(photo[y : y + 360, x : x + 640]), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    rows = [{"video": f"{i % 8}.mp4", "messages": ["What is in the picture?", f"It is number {i}."]} for i in range(count)]
    return _write(folder / "videos.jsonl", rows)


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_builder(path: Path, model: Any) -> tuple[Records, ExampleBuilder]:
    """The same two objects for all three ways."""
    return open_records(str(path)), ExampleBuilder(model.build_preprocessor(for_inference=False, max_seq_len=LENGTH), 10**8)


def bare_loop(path: Path, model: Any, cores: int) -> tuple[int, float, float]:
    """A process a core that calls the builder and throws the result away. Returns records, seconds without and with start-up."""
    began = time.perf_counter()
    records, builder = make_builder(path, model)
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(cores)
    with concurrent.futures.ProcessPoolExecutor(cores, context, initializer=_keep, initargs=(barrier,)) as pool:
        spans = list(pool.map(_loop, [(records, builder, part, cores) for part in range(cores)]))
    steady = max(stop for _, stop in spans) - min(start for start, _ in spans)
    return len(records), steady, time.perf_counter() - began


def _keep(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


def _loop(work: tuple[Records, ExampleBuilder, int, int]) -> tuple[float, float]:
    records, builder, part, parts = work
    builder(records[part], example_rng(0, 0, 0, 0))  # imports and caches
    _barrier.wait()
    start = time.time()
    for i in range(part, len(records), parts):
        builder(records[i], example_rng(0, 0, 0, i))
    return start, time.time()


class _Map:
    """A torch map-style dataset of examples."""

    def __init__(self, records: Records, builder: ExampleBuilder):
        self.records, self.builder = records, builder

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.builder(self.records[i], example_rng(0, 0, 0, i))


def data_loader(path: Path, model: Any, cores: int) -> Iterator[Any]:
    """Batches from torch's DataLoader, collated in its workers, shuffled, epoch after epoch."""
    import torch
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    collate = model.build_collator(LENGTH, None, include_metadata=False)
    dataset: Any = _Map(*make_builder(path, model))
    loader = DataLoader(
        dataset, BATCH, shuffle=True, num_workers=cores, collate_fn=collate, prefetch_factor=2, persistent_workers=True, drop_last=True,
        multiprocessing_context="spawn",
    )  # fmt: skip
    while True:
        yield from loader


def ray_data(path: Path, model: Any, cores: int) -> Iterator[Any]:
    """Batches from the training loader, streamed by as many actors as there are cores."""
    data = DataConfig.from_dict({"datasets": {"x": {"path": str(path)}}, "actors": cores})
    yield from TrainLoader(data, model, BATCH, LENGTH, 0, 0, 1)


def on_ray(way: Callable[[], Any], cores: int) -> Any:
    """Runs a way on a Ray cluster of its own, with a CPU for each actor and one for the consumer."""
    from pipelines.cluster import connect

    with connect(num_cpus=cores + 1, object_store_memory=512 << 20):
        return way()


def consume(make: Callable[[], Iterator[Any]], batches: int) -> tuple[int, float, float]:
    """Records, seconds from the first batch on, seconds in all. Batches that were ready with the first do not count as steady."""
    began = time.perf_counter()
    iterator = make()
    warm = 6
    for _ in range(warm):
        next(iterator)
    start = time.perf_counter()
    for _ in range(batches):
        next(iterator)
    stop = time.perf_counter()
    iterator.close()  # type: ignore[attr-defined]
    share = batches / (batches + warm)
    return batches * BATCH, stop - start, (stop - began) * share


class PeakMemory:
    """Samples the memory of this process, all its descendants, and Ray's processes."""

    def __enter__(self) -> PeakMemory:
        self.peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            self.peak = max(self.peak, memory())


def memory() -> int:
    """Bytes: proportional set sizes of this process and its descendants."""
    total = 0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def stream(path: Path, model: Any, cores: int, minutes: float) -> tuple[list[tuple[float, float]], int]:
    """Streams; (minutes, MiB) every ten seconds, and the number of batches."""
    samples: list[tuple[float, float]] = []
    began = shown = time.perf_counter()
    batches = ray_data(path, model, cores)
    for done in itertools.count(1):
        next(batches)
        now = time.perf_counter()
        if now - shown >= 10:
            shown = now
            samples.append(((now - began) / 60, memory() / 2**20))
            if len(samples) % 3 == 0:
                print(f"{samples[-1][0]:6.1f} min {done * BATCH:8,} records {samples[-1][1]:8.0f} MiB", flush=True)
        if now - began > minutes * 60:
            break
    batches.close()  # type: ignore[attr-defined]
    return samples, done


def soak(path: Path, model: Any, cores: int, minutes: float) -> None:
    """Streams for some minutes; prints the memory every half minute and its slope over the last three quarters."""
    samples, done = on_ray(lambda: stream(path, model, cores, minutes), cores)
    late = np.array(samples[len(samples) // 4 :])
    slope = np.polyfit(late[:, 0], late[:, 1], 1)[0]
    print(
        f"{done * BATCH:,} records in {minutes:g} min; memory {late[:, 1].min():.0f}-{late[:, 1].max():.0f} MiB, slope {slope:+.2f} MiB/min"
    )


if __name__ == "__main__":
    main()
