"""From records to batches: a bare loop on every core, torch's DataLoader, and the Ray Data pipeline, on the same files in one run.

    .venv/bin/python benchmarks/data_pipeline.py                                            # JPEGs and video clips
    .venv/bin/python benchmarks/data_pipeline.py --images 64 --videos 24 --rounds 1         # does it run?
    .venv/bin/python benchmarks/data_pipeline.py --soak 20                                  # does memory stay flat for 20 minutes?

The images are photographs (scikit-image) cropped to 1024 x 768, the videos 10 s of 640 x 360 h264; the model is Molmo2's
preprocessor (378-pixel crops, up to 8; videos: 16 frames). All three decode, preprocess and collate the same records into batches of
8 with the same functions; the bare loop throws the batches away where it made them, the pipelines bring them into this process. The ways
take turns, `--rounds` times; the last line is the ratio of their medians. The columns:

- records/s: in the steady state, on all cores. Start-up (processes, imports, the first batches) does not count: for the two
  pipelines the clock starts after WARM batches and stops with the last one, while they are still at work; the bare loop is the
  sum over its processes of records / seconds, after one record each.
- ms CPU: of all processes together (the pipeline's own included), for a record in that time. Unlike the rate it hardly depends
  on what else the machine does.
- start s: from the call to the start of the clock.
- memory: the sum of all processes' proportional set sizes at the end, Ray's own included.
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
# Ray (which reads this spelling) gives its workers a niceness of 15: on a busy machine they would stand back for the other ways.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112

import argparse  # noqa: E402
import concurrent.futures  # noqa: E402
import contextlib  # noqa: E402
import importlib.metadata  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import multiprocessing  # noqa: E402
import platform  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, NamedTuple  # noqa: E402

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
WARM = 6
FILES = 200
MODEL = "configs/models/molmo2-4b.yaml"


class Measured(NamedTuple):
    """One run of one way."""

    rate: float
    """Records a second."""
    cpu: float
    """CPU seconds a record."""
    start: float
    """Seconds."""
    memory: int
    """Bytes."""


def main() -> None:
    """Makes the files, runs the three ways in turn, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=320, help="records a round")
    parser.add_argument("--videos", type=int, default=64, help="records a round; 0: none")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
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
        for kind, write, count in (("JPEG 1024x768", write_images, arguments.images), ("video, 16 frames", write_videos, arguments.videos)):
            if count:
                compare(kind, write(folder, count), model, arguments.cores, -(-count // BATCH), arguments.rounds)


def compare(kind: str, path: Path, model: Any, cores: int, batches: int, rounds: int) -> None:
    """One table: the three ways on the same records."""
    ways: dict[str, Callable[[], Measured]] = {
        "bare loop": lambda: bare_loop(path, model, cores),
        "DataLoader": lambda: consume(lambda: data_loader(path, model, cores, batches), batches, 2 * cores),
        "Ray Data": lambda: on_ray(lambda: consume(lambda: ray_data(path, model, cores), batches), cores),
    }
    found: dict[str, list[Measured]] = {name: [] for name in ways}
    print(f"\n{kind}: {batches * BATCH} records a round\n{'':12}{'records/s':>10}{'ms CPU':>8}{'start s':>9}{'memory':>12}")
    for _ in range(rounds):
        for name, way in ways.items():
            one = way()
            found[name].append(one)
            print(f"{name:12}{one.rate:10.2f}{one.cpu * 1e3:8.1f}{one.start:9.1f}{one.memory / 2**20:8.0f} MiB", flush=True)
    bare, loader, ours = (np.median([(one.rate, one.cpu) for one in runs], axis=0) for runs in found.values())
    print(
        f"Ray Data / bare loop = {ours[0] / bare[0]:.3f} (must be >= 0.85), Ray Data / DataLoader = {ours[0] / loader[0]:.3f} "
        f"(must be >= 1.0); CPU time: {bare[1] / ours[1]:.3f} and {loader[1] / ours[1]:.3f}",
        flush=True,
    )


def make_model(folder: Path) -> Any:
    """Molmo2's configuration with a small tokenizer, so that nothing is downloaded."""
    train_tokenizer(["What is in the picture? It is number 0123456789."], 400, folder / "tokenizer")
    overrides = [f"llm.tokenizer.identifier={folder / 'tokenizer'}", "data_formatter.message_format=role", "mm_preprocessor.max_frames=16"]
    return BaseModelConfig.load(MODEL, overrides)


def write_images(folder: Path, count: int) -> Path:
    """Photographs of different contents and the same size (at most FILES, then used again), and their records."""
    import skimage.data

    photos = [Image.fromarray(getattr(skimage.data, name)()) for name in ("astronaut", "chelsea", "coffee", "rocket")]
    for i in range(min(count, FILES)):
        photo = photos[i % len(photos)]
        left, top = (i * 7) % 40, (i * 3) % 30
        photo.crop((left, top, photo.width - 40 + left, photo.height - 30 + top)).resize((1024, 768)).save(folder / f"{i}.jpg", quality=90)
    rows = [{"image": f"{i % FILES}.jpg", "messages": ["What is in the picture?", f"It is number {i}."]} for i in range(count)]
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


def make_collator(model: Any) -> Any:
    """The same for all three ways: it makes the tensors of a batch."""
    return model.build_collator(LENGTH, None, include_metadata=False)


def bare_loop(path: Path, model: Any, cores: int) -> Measured:
    """A process a core that makes batches and throws them away."""
    began = time.time()
    records, builder = make_builder(path, model)
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(cores)
    with concurrent.futures.ProcessPoolExecutor(cores, context, initializer=_keep, initargs=(barrier,)) as pool:
        spans = list(pool.map(_loop, [(records, builder, make_collator(model), part, cores) for part in range(cores)]))
        used = memory()
    counts = [len(range(part, len(records), cores)) for part in range(cores)]
    rate = sum(count / (stop - start) for count, (start, stop, _) in zip(counts, spans))
    return Measured(rate, sum(cpu for *_, cpu in spans) / len(records), min(start for start, *_ in spans) - began, used)


def _keep(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


def _loop(work: tuple[Records, ExampleBuilder, Any, int, int]) -> tuple[float, float, float]:
    records, builder, collate, part, parts = work
    collate([builder(records[part], example_rng(0, 0, 0, 0))])  # imports and caches
    _barrier.wait()
    start, cpu = time.time(), time.process_time()
    mine = range(part, len(records), parts)
    for first in range(0, len(mine), BATCH):
        collate([builder(records[i], example_rng(0, 0, 0, i)) for i in mine[first : first + BATCH]])
    return start, time.time(), time.process_time() - cpu


class _Map:
    """A torch map-style dataset of examples."""

    def __init__(self, records: Records, builder: ExampleBuilder):
        self.records, self.builder = records, builder

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.builder(self.records[i], example_rng(0, 0, 0, i))


def data_loader(path: Path, model: Any, cores: int, batches: int) -> Iterator[Any]:
    """Batches from torch's DataLoader, collated in its workers, shuffled, epoch after epoch; more than `consume` measures, so that its
    workers are busy to the end."""
    import torch
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    dataset: Any = _Map(*make_builder(path, model))
    count = (WARM + batches + 2 * cores) * BATCH
    order = np.concatenate([np.random.RandomState(epoch).permutation(len(dataset)) for epoch in range(-(-count // len(dataset)))])
    yield from DataLoader(
        dataset, BATCH, sampler=order[:count].tolist(), num_workers=cores, collate_fn=make_collator(model), prefetch_factor=2,
        multiprocessing_context="spawn",
    )  # fmt: skip


def ray_data(path: Path, model: Any, cores: int) -> Iterator[Any]:
    """Batches from the training loader, streamed by as many actors as there are cores."""
    data = DataConfig.from_dict({"datasets": {"x": {"path": str(path)}}, "actors": cores})
    yield from TrainLoader(data, model, BATCH, LENGTH, 0, 0, 1)


def on_ray(way: Callable[[], Any], cores: int) -> Any:
    """Runs a way on a Ray cluster of its own, with a CPU for each actor and one for the consumer."""
    from pipelines.cluster import connect

    before = dict(os.environ)
    try:
        with connect(num_cpus=cores + 1):  # and the object store that a training run gets
            return way()
    finally:  # what `connect` sets for Ray's processes (memory allocation among it) is not for the next way
        os.environ.clear()
        os.environ.update(before)


def consume(make: Callable[[], Iterator[Any]], batches: int, rest: int = 0) -> Measured:
    """Takes batches as fast as they come and throws them away, in the end `rest` more that are not measured."""
    began = time.perf_counter()
    iterator = make()
    for _ in range(WARM):
        next(iterator)
    start, cpu = time.perf_counter(), cpu_seconds()
    for _ in range(batches):
        next(iterator)
    stop = time.perf_counter()
    cpu, used = cpu_seconds() - cpu, memory()
    for _ in itertools.islice(iterator, rest):
        pass
    iterator.close()  # type: ignore[attr-defined]
    return Measured(batches * BATCH / (stop - start), cpu / (batches * BATCH), start - began, used)


def processes() -> list[psutil.Process]:
    """This process and its descendants; Ray's own are among them."""
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


def cpu_seconds() -> float:
    """CPU time of `processes`, including those of their children that have ended."""
    total = 0.0
    for process in processes():
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def memory() -> int:
    """Bytes: proportional set sizes of this process and its descendants."""
    total = 0
    for process in processes():
        with contextlib.suppress(psutil.Error):  # it has just ended
            total += process.memory_full_info().pss
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
