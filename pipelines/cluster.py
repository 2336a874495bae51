"""The one place that starts Ray, or joins it.

A job runs in three situations and should not have to know which: alone on a machine (a cluster of its own is started and shut
down again), inside `ray job submit` or beside a running cluster (`RAY_ADDRESS` is set: join it), or called by another job
that already connected (use that connection).
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import ray

from molmo_core.config import ConfigError
from pipelines import environment

_CGROUP = Path("/sys/fs/cgroup")
CONNECT_TIMEOUT_S = 10
EXIT_TIMEOUT_S = 10
JOB_STOP_S = 3
"""Ray's default of RAY_JOB_STOP_WAIT_TIME_S (ray.dashboard.modules.job.job_supervisor)."""


@contextlib.contextmanager
def connect(
    num_cpus: int | None = None,
    object_store_memory: int | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """Connects to Ray for the length of a `with` block; only what it started itself is shut down at the end.

    Args:
        num_cpus: CPUs that a cluster started here offers (None = those that Ray finds: the machine's, or what its container may
            use). More than there are is allowed: light actors then share a core. Ignored when joining, like the next.
        object_store_memory: bytes of its object store (None = see `default_object_store_memory`).
        env: environment variables for all workers, in either case.

    Raises:
        ConfigError: `RAY_ADDRESS` is set and no cluster answers there.
    """
    if ray.is_initialized():
        yield
        return
    variables = {name: os.environ.get(name, value) for name, value in environment.WORKER.items()} | dict(env or {})
    os.environ.update(variables)
    address = os.environ.get("RAY_ADDRESS")
    common: dict[str, Any] = {"runtime_env": {"env_vars": variables}, "log_to_driver": False}
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    if address:
        _check_answers(address)
        ray.init(address=address, logging_level=logging.WARNING, **common)
    else:
        _start(num_cpus, object_store_memory, common)
    try:
        with contextlib.nullcontext() if address else _watched(before):
            yield
    finally:
        gc.collect()  # what holds objects of this cluster goes before it
        started = [] if address else _workers()
        ray.shutdown()
        _end(started)


@contextlib.contextmanager
def reading(results: Iterable[Any]) -> Iterator[Iterator[Any]]:
    """Iterates over what Ray Data gives; its threads end with the block, not when garbage is collected, maybe after the cluster."""
    iterator = iter(results)
    try:
        yield iterator
    finally:
        iterator.close()  # type: ignore[attr-defined]  # a generator


def stop_grace() -> int | None:
    """Seconds after SIGTERM at which `ray job stop` kills this process and those that it started; None if no `ray job submit` started it.

    Ray hands a submitted job its configuration, and the variables of the process that would stop it, in its environment.
    """
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        return None
    return int(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", JOB_STOP_S))


# Ends the processes whose ids it is given, if they outlive the process at the other end of its input.
_WATCH = f"""
import contextlib, psutil, sys
watched = []
for pid in sys.argv[1:]:
    with contextlib.suppress(psutil.NoSuchProcess):
        watched.append(psutil.Process(int(pid)))
sys.stdin.read()
for left in psutil.wait_procs(watched, timeout={EXIT_TIMEOUT_S})[1]:
    with contextlib.suppress(psutil.NoSuchProcess):
        left.kill()
"""


@contextlib.contextmanager
def _watched(before: set[int]) -> Iterator[None]:
    """A process that ends the cluster's agents if this one is killed: they notice it, but first wait a minute for their dead server.

    The cluster's processes are the children that are new since `before`.
    """
    pids = [str(process.pid) for process in psutil.Process().children(recursive=True) if process.pid not in before]
    with subprocess.Popen([sys.executable, "-c", _WATCH, *pids], stdin=subprocess.PIPE, start_new_session=True) as watcher:
        try:
            yield
        finally:
            watcher.kill()


def _workers() -> list[psutil.Process]:
    """The processes under the raylet that this process started."""
    raylets = [child for child in psutil.Process().children() if child.name() == "raylet"]
    return [worker for raylet in raylets for worker in raylet.children(recursive=True)]


def _end(workers: list[psutil.Process]) -> None:
    """Ends workers that outlive their cluster: Ray's exit handlers can lock themselves up (seen once)."""
    _, alive = psutil.wait_procs(workers, timeout=EXIT_TIMEOUT_S)
    for worker in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()


def _check_answers(address: str) -> None:
    """Ray itself would wait for two minutes and then end the process."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "/" in host:
        return  # auto, ray://...: not a plain address
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ConfigError(f"RAY_ADDRESS={address}: no Ray cluster answers there ({error}); unset it to start one here") from None


def _start(num_cpus: int | None, object_store_memory: int | None, common: dict[str, Any]) -> None:
    environment.defaults(environment.LOCAL)
    # Ray's ports are open to every user of the machine, so it asks for a token unless RAY_AUTH_MODE says otherwise. One that only
    # this process and its children know keeps others out, and (unlike Ray's default) is not written to the home directory.
    if os.environ.get("RAY_AUTH_MODE", "token") == "token" and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray.init(
        address="local",  # else Ray joins any cluster that was started on this machine by `ray start`, whoever's it is
        num_cpus=num_cpus,
        object_store_memory=object_store_memory or default_object_store_memory(),
        include_dashboard=False,
        logging_level=logging.ERROR,
        **common,
    )


def cores() -> int:
    """Cores that this process may use: those of the machine, or fewer if it is in a container with a limit (of control groups)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = "max", "1"
    if (both := _CGROUP / "cpu.max").is_file():
        quota, period = both.read_text().split()
    elif (old := _CGROUP / "cpu" / "cpu.cfs_quota_us").is_file():
        quota, period = old.read_text().strip(), old.with_name("cpu.cfs_period_us").read_text()
    return max(1, min(count, int(quota) // int(period))) if quota.isdigit() else count


def cpus_for(workers: float, all_cores: bool = False) -> int:
    """CPUs of a cluster that is started for a job: those of its workers and one for what works beside them, or `all_cores` of the
    machine if these are more."""
    least = math.ceil(workers) + 1
    return max(least, cores()) if all_cores else least


def free_memory() -> int:
    """Bytes that processes started now can get without swapping: what is free of the machine, or of a container with a limit."""
    free = psutil.virtual_memory().available
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        if (_CGROUP / limit).is_file() and (most := (_CGROUP / limit).read_text().strip()).isdigit():
            stat = dict(line.split() for line in (_CGROUP / used).with_name("memory.stat").read_text().splitlines())
            # Cached files count as used, and are dropped when memory is wanted.
            free = min(free, int(most) - int((_CGROUP / used).read_text()) + int(stat[cache]))
    return max(0, free)


def default_object_store_memory() -> int:
    """Bytes: a quarter of the free shared memory (or of the disk behind /tmp, where Ray goes without it), at most
    the larger of 2 GiB and 1 GiB a core."""
    # With 2 GiB, 14 actors that decode did not stream 14,000 JPEGs in 70 s; with 16 GiB they came at 544 a second.
    limit = max(2, cores()) << 30
    shared = Path("/dev/shm")
    free = shutil.disk_usage(shared if shared.is_dir() else "/tmp").free
    return max(128 << 20, min(free // 4, limit))


def quiet() -> None:
    """Ray Data's own progress reports off: the jobs show theirs."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that they are off
