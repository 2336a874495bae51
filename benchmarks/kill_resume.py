"""Kills a training again and again, and compares what comes out with a run that nothing befell.

    python benchmarks/kill_resume.py --kills 20       # about twenty minutes on two cores

Three runs of a small model on two workers: in one a random worker is killed (SIGKILL) at random moments, while a checkpoint is written and
while the model is validated; in one the driver, which is started again; in one a node of a two-node cluster (ray.cluster_utils), in whose
place another one comes. A kill counts as equal if the run that it hit ends with bitwise the weights of the undisturbed one, and if MLflow
has the same loss for every step. `seconds` is from the kill until the step that was reached before it is done again; `parts` are those of
the worker's start among them.
Every line is one JSON object; the last one sums up.
"""

from __future__ import annotations

import argparse
import atexit
import concurrent.futures
import hashlib
import itertools
import json
import os
import platform
import queue
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
INTERVAL, VALIDATION = 4, 5
STEPS_A_KILL = 8
"""To get on between two kills, to the next save or validation if it is to hit one."""
PARTS = re.compile(r"start of a worker: (.*)")
STEP = re.compile(r"step (\d+)/\d+  loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("workers", "driver", "nodes"), help="one kind of kill (default: three fifths, one, one)")
    parser.add_argument("--folder", help="for runs and logs (default: one that is deleted); an undisturbed run there is used again")
    parser.add_argument("--train", nargs=3, metavar=("CONFIG", "NODES", "STEPS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        return train(arguments.train[0], *map(int, arguments.train[1:]))
    rng = random.Random(arguments.seed)
    planned = plans(arguments.kills, arguments.only)
    steps = 20 + STEPS_A_KILL * max(map(len, planned.values()))
    print(json.dumps({"machine": platform.platform(), "cores": os.cpu_count(), "steps": steps, "saved_every": INTERVAL}), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "undisturbed" / f"step_{steps:06d}" / "model").is_dir():
            prepare(folder)
            began = time.perf_counter()
            run(folder, "undisturbed", [], steps, rng)
            print(json.dumps({"run": "undisturbed", "seconds": round(time.perf_counter() - began, 1)}), flush=True)
        expected = outcome(folder, "undisturbed", steps)
        kills = []
        for name, plan in planned.items():
            if plan:
                done, found = run(folder, name, plan, steps, rng)
                kills += [kill | compared(found, expected) for kill in done]
                print(json.dumps({"run": name} | compared(found, expected)), flush=True)
        seconds = [kill["seconds"] for kill in kills if kill["seconds"] is not None]
        line = {"kills": len(kills), "completed": len(seconds), "equal": sum(kill["equal"] for kill in kills)}
        print(json.dumps(line | {"seconds_median": round(statistics.median(seconds), 1), "seconds_most": max(seconds)}), flush=True)
    if line["equal"] != arguments.kills:
        sys.exit(1)


def plans(count: int, only: str | None) -> dict[str, list[str]]:
    """The kills of each run."""
    shares = {"workers": count - count // 5 * 2, "driver": count // 5, "nodes": count // 5} if only is None else {only: count}
    kinds = {"workers": ("worker", "saving", "validating"), "driver": ("driver",), "nodes": ("node",)}
    return {name: list(itertools.islice(itertools.cycle(kinds[name]), share)) for name, share in shares.items()}


def compared(found: tuple[str, dict[int, float]], expected: tuple[str, dict[int, float]]) -> dict[str, object]:
    """Whether a run's outcome is the undisturbed one's."""
    weights, differ = found[0] == expected[0], sum(found[1][step] != expected[1].get(step) for step in found[1])
    missing = len(expected[1].keys() - found[1].keys())
    return {"equal": weights and not differ and not missing, "weights_equal": weights, "losses_differ": differ, "losses_missing": missing}


def prepare(folder: Path) -> None:
    """Squares of one colour with a question each, prepared, and the configuration of a run on them."""
    rng = np.random.RandomState(0)
    rows = []
    for i in range(64):
        colour = ("red", "blue")[i % 2]
        pixels = np.zeros((64, 64, 3), np.uint8)
        pixels[8:40, 8:56, 0 if colour == "red" else 2] = 150 + rng.randint(100)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        messages = [{"role": "user", "content": "Which colour?"}, {"role": "assistant", "content": colour}]
        rows.append({"image": f"{i}.png", "messages": messages})
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "jobs.prepare", "configs/data/records.yaml"]
    subprocess.run([*command, f"records={folder}/records.jsonl", f"output={folder}/data"], cwd=ROOT, check=True, capture_output=True)
    content = (ROOT / "configs/train/demo.yaml").read_text().replace("../models", f"{ROOT}/configs/models")
    (folder / "train.yaml").write_text(content)


def environment(folder: Path) -> dict[str, str]:
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | variables


def train(config: str, nodes: int, steps: int) -> None:
    """What a killed process does: one run, on a cluster of its own, or of two nodes that are replaced when they die."""
    from pipelines.training.config import TrainConfig
    from pipelines.training.trainer import run_training

    folder = Path(config).parent
    overrides = [
        f"name={folder.name}", f"storage={folder.parent}", f"steps={steps}", f"checkpoint.interval={INTERVAL}", "log_interval=1",
        "global_batch_size=8", "max_failures=100", f"data.datasets.easy_vqa.path={folder.parent}/data",
        f"model.llm.tokenizer.identifier={folder.parent}/data/tokenizer",
        f"validation={{data: {{datasets: {{other: {{path: {folder.parent}/data}}}}}}, interval: {VALIDATION}, batches: 2}}",
    ]  # fmt: skip
    settings = TrainConfig.load(folder.parent / "train.yaml", overrides)
    if not nodes:
        run_training(settings, num_cpus=3)
        return
    os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 128 << 20})
    variables = {name: os.environ[name] for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
    # Before the others come: the driver belongs to the node that is not killed.
    ray.init(address=cluster.address, runtime_env={"env_vars": variables}, log_to_driver=False)
    members = [cluster.add_node(num_cpus=1, object_store_memory=128 << 20) for _ in range(nodes)]
    cluster.wait_for_nodes()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:  # nodes can be started in the main thread only
        training = pool.submit(run_training, settings)
        while not training.done():
            time.sleep(0.2)
            for i, node in enumerate(members):
                if not node.any_processes_alive() or node.dead_processes():
                    cluster.remove_node(node, allow_graceful=False)
                    members[i] = cluster.add_node(num_cpus=1, object_store_memory=128 << 20)
    ray.shutdown()
    cluster.shutdown()
    training.result()


class Training:
    """The process of a run, and the lines that it prints."""

    def __init__(self, folder: Path, name: str, nodes: int, steps: int):
        (folder / name).mkdir(exist_ok=True)
        self.folder, self.log = folder / name, (folder / f"{name}.log").open("a", buffering=1)
        command = [sys.executable, __file__, "--train", str(folder / name / "config"), str(nodes), str(steps)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment(folder), stdout=subprocess.PIPE, stderr=self.log, text=True, start_new_session=True
        )
        self.parts = ""
        """Of the last start of a worker."""
        atexit.register(self._end)
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _end(self) -> None:
        """Should this process be stopped before it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log.write(line)
            self._lines.put(line)
        self._lines.put(None)

    def lines(self) -> Iterator[str]:
        """What it prints from here on, until it ends."""
        while (line := self._lines.get(timeout=300)) is not None:
            yield line

    def pending(self) -> Iterator[str]:
        """What it has printed already."""
        while not self._lines.empty() and (line := self._lines.get()) is not None:
            yield line

    def below(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


def run(
    folder: Path, name: str, plan: list[str], steps: int, rng: random.Random
) -> tuple[list[dict[str, object]], tuple[str, dict[int, float]]]:
    """A run with kills.

    Returns:
        The kills, and what came out: the hash of the weights, the loss of each step.
    """
    nodes = 2 if name == "nodes" else 0
    training = Training(folder, name, nodes, steps)
    kills: list[dict[str, object]] = []
    reached = INTERVAL + 3  # so that there is something to continue from
    for i, kind in enumerate(plan):
        target = reached + rng.randint(2, max(2, (steps - 10 - reached) // (len(plan) - i)))
        if kind == "validating":
            target = -(-target // VALIDATION) * VALIDATION
        reached = seen(training, target)
        reached, victim = strike(training, kind, reached, rng)
        began = time.perf_counter()
        if kind == "driver":
            training.process.wait()
            training = Training(folder, name, nodes, steps)
        seen(training, reached, again=True)
        kills.append(
            {"kill": kind, "process": victim, "at_step": reached, "seconds": round(time.perf_counter() - began, 1), "parts": training.parts}
        )
        print(json.dumps(kills[-1]), flush=True)
    for _ in training.lines():
        pass
    if training.process.wait() != 0:
        raise SystemExit(f"{name} ended with {training.process.returncode}:\n{(folder / f'{name}.log').read_text()[-4000:]}")
    return kills, outcome(folder, name, steps)


def seen(training: Training, target: int, again: bool = False) -> int:
    """Waits until a step is done; after a kill (`again`) until the run has continued and it is done once more, or was saved."""
    for line in training.lines():
        if match := PARTS.match(line):
            training.parts = match[1]
        if again:
            again = not line.startswith("continues after")
        elif (match := STEP.search(line)) and int(match[1]) >= target:
            return int(match[1])
    raise SystemExit(f"{training.folder.name} ended before step {target}:\n{Path(training.log.name).read_text()[-4000:]}")


def strike(training: Training, kind: str, reached: int, rng: random.Random) -> tuple[int, str]:
    """Kills; returns the last step that was seen before, and what was hit."""
    moment: Callable[[], bool]
    if kind == "saving":
        partial = list(training.folder.glob(".step_*.partial"))
        moment = lambda: bool(partial) or any(training.folder.glob(".step_*.partial"))  # noqa: E731
    else:
        wait = 0.0 if kind == "validating" else rng.uniform(0.0, 1.0)
        until = time.perf_counter() + wait
        moment = lambda: time.perf_counter() >= until  # noqa: E731
    victims = choose(training, kind, rng)
    while not moment():
        time.sleep(0.001)
    name = victims[0].name()
    for victim in victims:
        victim.kill()
    for line in training.pending():
        if match := STEP.search(line):
            reached = int(match[1])
    return reached, name


def choose(training: Training, kind: str, rng: random.Random) -> list[psutil.Process]:
    if kind == "driver":
        return [psutil.Process(training.process.pid)]
    below = training.below()
    workers = sorted((p for p in below if "RayTrainWorker" in " ".join(p.cmdline())), key=lambda p: p.pid)
    if not workers:
        raise SystemExit(f"no worker found among {[p.name() for p in below]}")
    worker = rng.choice(workers)
    if kind != "node":
        return [worker]
    raylet = next(parent for parent in worker.parents() if parent.name() == "raylet")
    return [raylet, *raylet.children(recursive=True)]


def outcome(folder: Path, name: str, steps: int) -> tuple[str, dict[int, float]]:
    """The hash of a run's weights, and its losses by step (of a repeated one the last)."""
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    client = mlflow.MlflowClient()
    record = json.loads((folder / name / "run.json").read_text())
    history = client.get_metric_history(record["mlflow_run"], "loss")
    losses = {metric.step: metric.value for metric in sorted(history, key=lambda metric: metric.timestamp)}
    weights = folder / name / f"step_{steps:06d}" / "model" / "model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest(), losses


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
