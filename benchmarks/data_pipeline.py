"""The streamed pipeline beside what it competes with, on the same files and cores in one run; and whether its memory stays flat.

    .venv/bin/python benchmarks/data_pipeline.py                                     # JPEGs and video clips
    .venv/bin/python benchmarks/data_pipeline.py --warm 2 --seconds 2 --rounds 1     # does it run?
    .venv/bin/python benchmarks/data_pipeline.py --soak 20                           # does memory stay flat for 20 minutes?

The images are photographs (scikit-image) cropped to 1024 x 768, the videos 10 s of 640 x 360 h264; the model is Molmo2's
preprocessor (378-pixel crops, up to 8; videos: 16 frames). All three decode, preprocess and collate the same records into batches of
8 with the same functions, over and over; the bare loop throws the batches away where it made them, the pipelines bring them into this
process. The ways take turns, `--rounds` times; the last line is the ratio of their medians. The columns:

- records/s: in the steady state, on all cores, over `--seconds`. Start-up (processes, imports, the first batch) does not count, nor do
  the `--warm` seconds after it, in which processes and the object store touch their memory for the first time. The bare loop is the
  sum of its processes' rates.
- ms CPU: of all processes together (the pipeline's own included), for a record in that time. Unlike the rate it hardly depends
  on what else the machine does.
- start s: from the call to the first batch.
- memory: the sum of all processes' proportional set sizes at the end, Ray's own included.

Each way runs in the environment that it has when somebody uses it: pipelines/cluster.py gives Ray's processes two settings of glibc's
malloc. To give them to all three, put them in front: MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=268435456
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
# Ray (which reads this spelling) gives its workers a niceness of 15: on a busy machine they would stand back for the other ways.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112

import argparse  # noqa: E402
import collections  # noqa: E402
import concurrent.futures  # noqa: E402
import contextlib  # noqa: E402
import importlib.metadata  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import multiprocessing  # noqa: E402
import platform  # noqa: E402
import re  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, NamedTuple  # noqa: E402

import numpy as np  # noqa: E402
import psutil  # noqa: E402
from PIL import Image  # noqa: E402

from molmo_core.models.base import BaseModelConfig  # noqa: E402
from pipelines.data.batches.loader import TrainLoader  # noqa: E402
from pipelines.data.builder import ExampleBuilder, example_rng  # noqa: E402
from pipelines.data.config import DataConfig  # noqa: E402
from pipelines.data.preparation.train_tokenizer import train_tokenizer  # noqa: E402
from pipelines.data.sources import Records, open_records  # noqa: E402

BATCH, LENGTH = 8, 4096
IMAGES, VIDEOS = 200, 8
MODEL = "configs/models/molmo2-4b.yaml"


class Span(NamedTuple):
    """When a way is measured: seconds from its first batch on that do not count, seconds that do."""

    warm: float
    seconds: float


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
    parser.add_argument("--only", choices=["jpeg", "video"], help="one of the two kinds of records (both unless given)")
    parser.add_argument("--seconds", type=float, default=20, help="measured, of each way in each round")
    parser.add_argument("--warm", type=float, default=20, help="seconds between the first batch and what is measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--soak", type=float, default=0, help="minutes of streaming images, instead of the comparison")
    arguments = parser.parse_args()
    packages = ("ray", "torch", "pillow", "decord", "numpy")
    print(f"{cpu_name()}, {arguments.cores} cores; ", end="")
    print(", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages), flush=True)
    span = Span(arguments.warm, arguments.seconds)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder)
        if arguments.soak:
            soak(write_images(folder), model, arguments.cores, arguments.soak)
            return
        if arguments.only != "video":
            compare("JPEG 1024x768", write_images(folder), model, arguments.cores, span, arguments.rounds)
        if arguments.only != "jpeg":
            compare("video, 16 frames", write_videos(folder), model, arguments.cores, span, arguments.rounds)


def compare(kind: str, path: Path, model: Any, cores: int, span: Span, rounds: int) -> None:
    """One table: the three ways on the same records."""
    ways: dict[str, Callable[[], Measured]] = {
        "bare loop": lambda: bare_loop(path, model, cores, span),
        "DataLoader": lambda: consume(lambda: data_loader(path, model, cores), span),
        "Ray Data": lambda: on_ray(lambda: consume(lambda: ray_data(path, model, cores), span), cores),
    }
    found: dict[str, list[Measured]] = {name: [] for name in ways}
    print(f"\n{kind}: {span.seconds:g} s after {span.warm:g} s\n{'':12}{'records/s':>10}{'ms CPU':>8}{'start s':>9}{'memory':>12}")
    for _ in range(rounds):
        for name, way in ways.items():
            one = way()
            found[name].append(one)
            print(f"{name:12}{one.rate:10.2f}{one.cpu * 1e3:8.1f}{one.start:9.1f}{one.memory / 2**20:8.0f} MiB", flush=True)
    medians = {name: np.median([(one.rate, one.cpu) for one in runs], axis=0) for name, runs in found.items()}
    print("medians: " + ", ".join(f"{name} {rate:.2f} records/s {cpu * 1e3:.1f} ms" for name, (rate, cpu) in medians.items()))
    bare, loader, ours = medians.values()
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


def write_images(folder: Path) -> Path:
    """Photographs of different contents and the same size, and their records."""
    import skimage.data

    photos = [Image.fromarray(getattr(skimage.data, name)()) for name in ("astronaut", "chelsea", "coffee", "rocket")]
    for i in range(IMAGES):
        photo = photos[i % len(photos)]
        left, top = (i * 7) % 40, (i * 3) % 30
        photo.crop((left, top, photo.width - 40 + left, photo.height - 30 + top)).resize((1024, 768)).save(folder / f"{i}.jpg", quality=90)
    rows = [{"image": f"{i}.jpg", "messages": ["What is in the picture?", f"It is number {i}."]} for i in range(IMAGES)]
    return _write(folder / "images.jsonl", rows)


def write_videos(folder: Path) -> Path:
    """Clips that pan over a photograph, 10 s at 25 frames a second, and their records (several of each file)."""
    import av
    import skimage.data

    photo = np.asarray(Image.fromarray(skimage.data.astronaut()).resize((1280, 720)))
    for k in range(VIDEOS):
        with av.open(str(folder / f"{k}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=25, width=640, height=360, pix_fmt="yuv420p", options={"g": "50"})
            for t in range(250):
                x, y = (t * (k + 1)) % 640, (t * 2) % 360
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(photo[y : y + 360, x : x + 640]), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    rows = [{"video": f"{i % VIDEOS}.mp4", "messages": ["What is in the picture?", f"It is number {i}."]} for i in range(IMAGES)]
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


def bare_loop(path: Path, model: Any, cores: int, span: Span) -> Measured:
    """A process a core that makes batches and throws them away."""
    began = time.time()
    records, builder = make_builder(path, model)
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(cores)
    with concurrent.futures.ProcessPoolExecutor(cores, context, initializer=_keep, initargs=(barrier,)) as pool:
        loops = list(pool.map(_loop, [(records, builder, make_collator(model), part, cores, span) for part in range(cores)]))
        used = memory()
    count = sum(loop.count for loop in loops)
    rate = sum(loop.count / loop.seconds for loop in loops)
    return Measured(rate, sum(loop.cpu for loop in loops) / count, min(loop.first for loop in loops) - began, used)


def _keep(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


class _Loop(NamedTuple):
    count: int
    seconds: float
    cpu: float
    first: float


def _loop(work: tuple[Records, ExampleBuilder, Any, int, int, Span]) -> _Loop:
    records, builder, collate, part, parts, span = work
    mine = itertools.cycle(range(part, len(records), parts))

    def batch() -> None:
        collate([builder(records[i], example_rng(0, 0, 0, i)) for i in itertools.islice(mine, BATCH)])

    batch()  # imports and caches
    first = time.time()
    _barrier.wait()
    run_for(span.warm, batch)
    cpu = time.process_time()
    batches, seconds = run_for(span.seconds, batch)
    cpu = time.process_time() - cpu
    run_for(1, batch)  # the others are still at work
    return _Loop(batches * BATCH, seconds, cpu, first)


def run_for(seconds: float, batch: Callable[[], Any]) -> tuple[int, float]:
    """Calls for so long; (calls, seconds that they took)."""
    began = time.perf_counter()
    for done in itertools.count(1):
        batch()
        if (took := time.perf_counter() - began) >= seconds:
            return done, took
    raise AssertionError


class _Map:
    """A torch map-style dataset of examples."""

    def __init__(self, records: Records, builder: ExampleBuilder):
        self.records, self.builder = records, builder

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.builder(self.records[i], example_rng(0, 0, 0, i))


class _Shuffled:
    """Places of a dataset, epoch after epoch, each in another order."""

    def __init__(self, size: int):
        self.size, self.ended = size, False

    def __iter__(self) -> Iterator[int]:
        for epoch in itertools.count():
            for place in np.random.RandomState(epoch).permutation(self.size).tolist():
                if self.ended:
                    return
                yield place


def data_loader(path: Path, model: Any, cores: int) -> Iterator[Any]:
    """Batches from torch's DataLoader, collated in its workers, shuffled, epoch after epoch."""
    import torch
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    dataset: Any = _Map(*make_builder(path, model))
    sampler: Any = _Shuffled(len(dataset))
    batches = iter(DataLoader(
        dataset, BATCH, sampler=sampler, num_workers=cores, collate_fn=make_collator(model), prefetch_factor=2,
        multiprocessing_context="spawn",
    ))  # fmt: skip
    try:
        yield from batches
    finally:  # workers that are stopped in the middle of a batch abort
        sampler.ended = True
        for _ in batches:
            pass


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


def consume(make: Callable[[], Iterator[Any]], span: Span) -> Measured:
    """Takes batches as fast as they come and throws them away."""
    began = time.perf_counter()
    iterator = make()
    next(iterator)
    start = time.perf_counter() - began
    run_for(span.warm, lambda: next(iterator))
    cpu = cpu_seconds()
    batches, seconds = run_for(span.seconds, lambda: next(iterator))
    cpu, used = cpu_seconds() - cpu, memory()
    iterator.close()  # type: ignore[attr-defined]
    return Measured(batches * BATCH / seconds, cpu / (batches * BATCH), start, used)


def processes() -> list[psutil.Process]:
    """This process and its descendants; Ray's own are among them."""
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


def cpu_name() -> str:
    """The processor, as Linux or Python calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


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
    return sum(memory_by_name().values())


def memory_by_name() -> dict[str, int]:
    """The same, summed over the processes of one kind."""
    total: dict[str, int] = collections.Counter()
    for process in processes():
        with contextlib.suppress(psutil.Error):  # it has just ended
            command = process.cmdline()
            name = command[0] if command[0].startswith("ray::") else " ".join(command)
            name = re.sub(r"[.]submit$|.*/(?=[^/ ]+ |[^/ ]+$)| .*", "", name) if process.pid != os.getpid() else "this process"
            total[name] += process.memory_full_info().pss
    return total


def stream(path: Path, model: Any, cores: int, minutes: float) -> tuple[list[tuple[float, dict[str, int]]], int]:
    """Streams; minutes and memory every ten seconds, and the number of batches."""
    samples: list[tuple[float, dict[str, int]]] = []
    began = shown = time.perf_counter()
    batches = ray_data(path, model, cores)
    for done in itertools.count(1):
        next(batches)
        now = time.perf_counter()
        if now - shown >= 10:
            shown = now
            samples.append(((now - began) / 60, memory_by_name()))
            if len(samples) % 3 == 0:
                used = sum(samples[-1][1].values()) / 2**20
                print(f"{samples[-1][0]:6.1f} min {done * BATCH:8,} records {used:8.0f} MiB", flush=True)
        if now - began > minutes * 60:
            break
    batches.close()  # type: ignore[attr-defined]
    return samples, done


def soak(path: Path, model: Any, cores: int, minutes: float) -> None:
    """Streams for some minutes; prints the memory every half minute, its slope over the last three quarters, and whose it is."""
    samples, done = on_ray(lambda: stream(path, model, cores, minutes), cores)
    late = samples[len(samples) // 4 :]
    times = [at for at, _ in late]

    def slope(values: list[int]) -> float:
        return float(np.polyfit(times, values, 1)[0]) / 2**20

    totals = [sum(names.values()) for _, names in late]
    low, high = min(totals) / 2**20, max(totals) / 2**20
    print(f"{done * BATCH:,} records in {minutes:g} min; memory {low:.0f}-{high:.0f} MiB, slope {slope(totals):+.2f} MiB/min")
    for name in sorted({name for _, names in late for name in names}):
        values = [names.get(name, 0) for _, names in late]
        if abs(slope(values)) >= 0.05:
            print(f"  {name:32} {values[0] / 2**20:7.0f} to {values[-1] / 2**20:6.0f} MiB, slope {slope(values):+.2f} MiB/min")


if __name__ == "__main__":
    main()
