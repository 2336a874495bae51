"""How training and serving grow with the GPUs of a host: one JSON line a measurement, as it comes.

    python benchmarks/scaling.py                                     # all GPUs of the host: 1, 2, 4, ... of them, and serving
    python benchmarks/scaling.py --launcher spawn --parts step equal # plain processes; needs no Ray
    python benchmarks/scaling.py --device cpu --workers 1 2          # tiny sizes on any CPU: checks the script

`step`: a training step of Molmo2-4B's shapes, `--rows` packs of 4,096 tokens and 14 crops a GPU, bfloat16: tokens a second of a GPU,
efficiency against one GPU, time of communication and how much of it nothing else ran beside. As in the loop of `pipelines.training`, the
host is at most a step ahead of the device; `host_s` is its time in a step. `hybrid`: the same with two replicas. `context`: one
sequence of 36,864 tokens and 384 frames over all GPUs. `equal`: the losses of 20 steps on the same global batches, against one GPU's.
`serve`: an engine a GPU behind one address, 32 requests a GPU. Training runs through Ray Train, or in plain processes; what a worker does
is the same. `predicted_gib` is what `jobs.plan` says beside the measured peak.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from shapes import model_config, pack

from pipelines.data.config import DataConfig
from pipelines.training.build import build
from pipelines.training.config import GroupConfig, OptimConfig, TrainConfig
from pipelines.training.mesh import Mesh
from pipelines.training.meter import Meter
from pipelines.training.optim import Optimizer
from pipelines.training.parallel import all_sum, rank, world_size
from pipelines.training.parallel_config import ParallelConfig
from pipelines.training.plan import plan
from pipelines.training.step import TrainStep, loss_weight

PARTS = ("step", "hybrid", "context", "equal", "serve")
EQUAL_STEPS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, nargs="*", help="default 1, 2, 4, ... GPUs; 1 comes first, others are compared with it")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--launcher", choices=("ray", "spawn"), default="ray")
    parser.add_argument("--steps", type=int, default=20, help="of a measurement, the first four not counted")
    parser.add_argument("--rows", type=int, default=1, help="packs a GPU in a step")
    parser.add_argument("--recompute", default="none", choices=("none", "selective", "full"))
    parser.add_argument("--levers", action="store_true", help="measure other units and settings of sharding, too")
    arguments = parser.parse_args()
    arguments.tiny = arguments.device == "cpu"
    gpus = torch.cuda.device_count() if not arguments.tiny else 2
    arguments.workers = sorted(arguments.workers or [n for n in (1, 2, 4, 8) if n <= gpus])
    name = "cpu" if arguments.tiny else torch.cuda.get_device_name()
    print(json.dumps({"torch": torch.__version__, "device": name, **vars(arguments)}), flush=True)
    alone: dict[str, Any] = {}
    launch = {"ray": ray_workers, "spawn": plain_workers}[arguments.launcher]
    if any(part != "serve" for part in arguments.parts):
        for workers in arguments.workers:
            for line in lines_of(functools.partial(launch, workers), arguments):
                print(json.dumps(compared(line, alone)), flush=True)
    if "serve" in arguments.parts:
        serve(arguments)


def compared(line: dict[str, Any], alone: dict[str, Any]) -> dict[str, Any]:
    """A line, with what it is beside the line of one worker, which is remembered."""
    part, first = line["part"], alone.setdefault(line["part"], line)
    if part in ("step", "hybrid") and "tokens_s_gpu" in line and (base := alone.get("step")):
        line["efficiency"] = round(line["tokens_s_gpu"] / base["tokens_s_gpu"], 3)
    if part == "equal":
        line["difference"] = max(abs(a - b) for a, b in zip(line["losses"], first["losses"]))
    return line


# -- launching -----------------------------------------------------------------------------------------------------------


def lines_of(launch: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What the first of the workers that `launch` starts writes, line by line as it comes."""
    with tempfile.TemporaryDirectory() as folder:
        arguments.out = f"{folder}/lines.jsonl"
        file = Path(arguments.out)
        file.touch()
        problem: list[BaseException] = []

        def run() -> None:
            try:
                launch(arguments)
            except BaseException as error:
                problem.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        with file.open() as lines:
            while True:
                ended = not thread.is_alive()
                while line := lines.readline():
                    yield json.loads(line)
                if ended:
                    break
                thread.join(0.2)
        if problem:
            raise problem[0]


def plain_workers(workers: int, arguments: argparse.Namespace) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(plain_worker, (workers, port, arguments), nprocs=workers)


def plain_worker(number: int, workers: int, port: int, arguments: argparse.Namespace) -> None:
    device = torch.device("cpu") if arguments.tiny else torch.device("cuda", number)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if workers > 1:
        backend = "gloo" if arguments.tiny else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=workers)
    work(device, arguments)
    if workers > 1:
        dist.barrier()  # a rank that leaves early can abort the other
        dist.destroy_process_group()


def ray_workers(workers: int, arguments: argparse.Namespace) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer, get_device

    from pipelines import cluster

    def worker() -> None:
        work(get_device(), arguments)

    with cluster.connect(num_cpus=cluster.cpus_for(workers)), tempfile.TemporaryDirectory() as folder:
        TorchTrainer(
            worker,
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=not arguments.tiny),
            torch_config=TorchConfig(backend="gloo" if arguments.tiny else "cpu:gloo,cuda:nccl"),
            run_config=RunConfig(name="scaling", storage_path=folder),
        ).fit()


# -- what a worker does ----------------------------------------------------------------------------------------------------


def work(device: torch.device, arguments: argparse.Namespace) -> None:
    """All parts that so many workers can do, on each of them."""
    workers = world_size()
    torch.set_num_threads(1 if arguments.tiny else torch.get_num_threads())
    todo: list[Callable[[], dict[str, Any]]] = []
    if "step" in arguments.parts:
        todo.append(functools.partial(steps, "step", ParallelConfig(), device, arguments))
    if "step" in arguments.parts and arguments.levers and workers > 1:
        for lever in ({"unit_blocks": 4}, {"unit_blocks": 9}, {"vision_unit": True}, {"reshard_after_forward": True}):
            todo.append(functools.partial(steps, "lever", ParallelConfig(**lever), device, arguments, **lever))  # type: ignore[arg-type]
    if "hybrid" in arguments.parts and workers >= 4:
        todo.append(functools.partial(steps, "hybrid", ParallelConfig(replicate=2), device, arguments))
    if "context" in arguments.parts and workers > 1:
        todo.append(functools.partial(steps, "context", ParallelConfig(context=workers), device, arguments))
    if "equal" in arguments.parts:
        todo.append(functools.partial(equal, device, arguments))
    for part in todo:
        line = part()
        if rank() == 0:
            with open(arguments.out, "a") as file:
                file.write(json.dumps(line) + "\n")
        torch._dynamo.reset()


def config_of(parallel: ParallelConfig, rows: int, arguments: argparse.Namespace, **changes: Any) -> TrainConfig:
    """A run of the benchmark's shapes: a sequence a pass, `rows` a step over all workers."""
    groups = {group: GroupConfig(lr=1e-5, warmup=0) for group in ("connector", "vit", "llm")}
    data = DataConfig.new(datasets={"random": {"path": "-"}}, pad_to_max=True)
    settings = {
        "name": "scaling", "model": model_config(arguments.tiny), "data": data, "steps": 100,
        "global_batch_size": rows, "device_batch_size": 1, "sequence_length": 128 if arguments.tiny else 4096,
        "precision": "fp32" if arguments.tiny else "bf16", "compile": not arguments.tiny, "num_workers": world_size(),
        "parallel": parallel, "ft_embedding": "all", "optim": OptimConfig(**groups),
    }  # fmt: skip
    return TrainConfig(**(settings | changes))


def crops_of(config: TrainConfig, arguments: argparse.Namespace) -> tuple[int, int]:
    """Crops of a row, and its image tokens."""
    if config.parallel.context > 1:
        return (3, 50) if arguments.tiny else (384, 384 * 81)
    return (2, 50) if arguments.tiny else (14, 392 + 2160)


def batch_of(config: TrainConfig, numbers: list[int], arguments: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Rows of random documents, each the same for a number everywhere."""
    crops, tokens = crops_of(config, arguments)
    rows = [pack(config.model, np.random.RandomState(number), 1, config.sequence_length, crops, tokens) for number in numbers]
    return {key: torch.from_numpy(np.concatenate([row[key] for row in rows])) for key in rows[0]}


def steps(part: str, parallel: ParallelConfig, device: torch.device, arguments: argparse.Namespace, **lever: Any) -> dict[str, Any]:
    """Seconds of a step of `--rows` rows a rank, or of one over all of them."""
    began = time.perf_counter()
    changes: dict[str, Any] = {"activation_checkpointing": arguments.recompute, "device_batch_size": arguments.rows}
    if parallel.context > 1:
        length = 128 if arguments.tiny else 36864
        changes = {"activation_checkpointing": "full", "device_batch_size": 1, "sequence_length": length}
    rows = changes["device_batch_size"]
    config = config_of(parallel, rows * world_size() // parallel.context, arguments, **changes)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    run = Run(config, device)
    built = time.perf_counter() - began
    first = run.mesh.data_rank * rows
    batch = batch_of(config, [*range(first, first + rows)], arguments)
    start = time.perf_counter()
    run.step(batch)
    wait(device)
    began, ends, hosts = time.perf_counter() - start, [], []
    for _ in range(arguments.steps - 1):
        start, before = time.perf_counter(), run.lost
        run.step(batch)
        hosts.append(time.perf_counter() - start)
        before.item()
        ends.append(time.perf_counter())
    seconds = statistics.median(np.diff(ends[2:]))
    tokens = batch["input_ids"].numel()
    line = {
        "part": part, "workers": world_size(), "mesh": [run.mesh.replicate, run.mesh.shard, run.mesh.context], **lever,
        "rows": rows, "recompute": config.activation_checkpointing,
        "step_s": round(seconds, 4), "host_s": round(statistics.median(hosts[3:]), 4),
        "tokens_s_gpu": round(tokens / parallel.context / seconds), "build_s": round(built, 1), "first_step_s": round(began, 1),
        "loss": round(run.lost.item(), 4),
    }  # fmt: skip
    if device.type == "cuda":
        line |= communication(lambda: run.step(batch), device) | {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1)}
        line["predicted_gib"] = round(plan(config, rows=rows, crops=crops_of(config, arguments)[0]).peak / 2**30, 1)
    return line


def equal(device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    """The losses of some steps on the same global batches on any number of workers: a row a worker where there are most."""
    rows = max(arguments.workers)
    config = config_of(ParallelConfig(), rows, arguments)
    run, losses = Run(config, device), []
    for number in range(EQUAL_STEPS):
        mine = range(number * rows, (number + 1) * rows)[run.mesh.data_rank :: run.mesh.data_size]
        run.step(batch_of(config, list(mine), arguments))
        losses.append(round(run.lost.item(), 5))
    return {"part": "equal", "workers": world_size(), "rows": rows, "losses": losses}


class Run:
    """A run's model and its steps, without what `pipelines.training.loop` tells and saves."""

    def __init__(self, config: TrainConfig, device: torch.device):
        self.mesh = Mesh.of(config, device)
        self.model = build(config, device, self.mesh)
        self.meter = Meter(self.model, device)
        self.take = TrainStep(config, self.model, Optimizer(self.model, config.optim), self.meter, [])
        self.lost = torch.zeros((), device=device)
        """Mean cross entropy of the last step's global batch, a scalar on the device."""

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        """One step on this rank's batch, which is on the host."""
        weight = all_sum(torch.tensor(loss_weight(batch) / self.mesh.context, dtype=torch.float64)).item()
        self.lost = self.meter.loss(self.take(1, batch, weight, {}).sums)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def communication(step: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Shares of a step's time in which something travels, and in which nothing else runs meanwhile; by a trace of the first rank."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    if world_size() == 1:
        return {}
    if rank() != 0:
        step()
        wait(device)
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step()
        wait(device)
    travel, other = [], []
    for event in trace.events():
        if event.device_type == DeviceType.CUDA and not event.name.startswith(("nccl:", "Optimizer", "ProfilerStep")):
            (travel if event.name.startswith("ncclDev") else other).append((event.time_range.start, event.time_range.end))
    everything, alone = union([*travel, *other]), union([*travel, *other]) - union(other)
    return {"communication": round(union(travel) / everything, 3), "exposed": round(alone / everything, 3)}


def union(intervals: list[tuple[float, float]]) -> float:
    """Length of what intervals cover together."""
    covered, end = 0.0, -np.inf
    for start, stop in sorted(intervals):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered


# -- serving ---------------------------------------------------------------------------------------------------------------


def serve(arguments: argparse.Namespace) -> None:
    """Decoded tokens a second of as many engines as there are GPUs, 32 requests each, against one."""
    import serve_load

    from molmo_core.registry import BaseModelConfig
    from pipelines import cluster
    from pipelines.serving.app import serving
    from pipelines.serving.config import ServeConfig
    from pipelines.serving.port import free_port

    each = 4 if arguments.tiny else 32
    load = argparse.Namespace(new=16 if arguments.tiny else 256, images=None, clients=4, tiny=arguments.tiny)
    alone = 0.0
    with tempfile.TemporaryDirectory() as folder:
        serve_load.save_random_model(Path(folder) / "model", arguments.tiny, not arguments.tiny)
        tokenizer = BaseModelConfig.load(folder + "/model").build_tokenizer()
        for replicas in arguments.workers:
            config = ServeConfig(
                model=f"{folder}/model", name="load", port=free_port(), replicas=replicas, frontends=1 if arguments.tiny else 4,
                gpus_per_replica=int(not arguments.tiny), dtype="float32" if arguments.tiny else "bfloat16", max_batch_size=each,
                max_queued_requests=1024,
            )  # fmt: skip
            with cluster.connect(num_cpus=cluster.cpus_for(replicas, all_cores=True)), serving(config) as url:
                serve_load.measure(url, each * replicas, tokenizer, load)  # warms up
                rate = serve_load.measure(url, each * replicas, tokenizer, load)["decode_tokens_s"]
            alone = alone or rate
            print(json.dumps({"part": "serve", "engines": replicas, "tokens_s": rate, "efficiency": round(rate / replicas / alone, 3)}))


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    main()
