"""Starting a cluster, joining one, using a connection that is there."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
import ray
from ray.dashboard.modules.job.job_supervisor import JobSupervisor

from molmo_core.config import ConfigError
from pipelines import cluster


def test_an_address_where_nothing_answers_is_said_at_once(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS=127.0.0.1:9: no Ray cluster answers there"), cluster.connect():
        pass
    assert not ray.is_initialized()


def test_object_store_is_bounded():
    assert 128 << 20 <= cluster.default_object_store_memory() <= max(2, cluster.cores()) << 30


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 16),
        ({"cpu.max": "max 100000\n"}, 16),
        ({"cpu.max": "450000 100000\n"}, 4),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "6400000 100000\n"}, 16),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 16),
        ({"cpu/cpu.cfs_quota_us": "800000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ],
)
def test_cores_are_those_that_a_container_may_use(files, expected, monkeypatch, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(cluster, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert cluster.cores() == expected


def test_ray_itself_finds_the_cores_unless_told(monkeypatch):
    given = {}
    monkeypatch.setattr(ray, "init", lambda **arguments: given.update(arguments))
    cluster._start(None, None, {})
    assert given["num_cpus"] is None, "Ray knows of a container's limits"


ALONE = """
import ray
from ray.dashboard.modules.job.job_supervisor import JobSupervisor
from pipelines import cluster
with cluster.connect(num_cpus=1, object_store_memory=128 << 20):
    print(ray.cluster_resources()["CPU"])
"""


@pytest.mark.alone
@pytest.mark.slow
def test_a_cluster_that_somebody_else_started_here_is_not_joined():
    """`ray start` leaves the address of its cluster in a file; here nothing answers at it."""
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # the names of sockets are short
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray" / "ray_current_cluster").write_text("127.0.0.1:9")
        variables = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"RAY_TMPDIR": folder}
        done = subprocess.run([sys.executable, "-c", ALONE], env=variables, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "1.0"), done.stderr


@pytest.mark.alone
@pytest.mark.slow
def test_a_cluster_of_its_own_is_used_by_inner_jobs_and_shut_down(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with cluster.connect(num_cpus=2, object_store_memory=128 << 20, env={"SEEN_BY_WORKERS": "yes"}):
        assert ray.cluster_resources()["CPU"] == 2
        with cluster.connect(num_cpus=64):
            assert ray.cluster_resources()["CPU"] == 2
        seen = ray.get(ray.remote(lambda: (os.environ.get("SEEN_BY_WORKERS"), os.getcwd())).remote())
        assert seen == ("yes", os.getcwd())
        worker = ray.get(ray.remote(lambda: os.getpid()).remote())
        assert worker in [process.pid for process in cluster._workers()]
    assert not ray.is_initialized()


def test_workers_that_outlive_their_cluster_are_ended(monkeypatch):
    monkeypatch.setattr(cluster, "EXIT_TIMEOUT_S", 0.5)
    with subprocess.Popen(["sleep", "600"]) as worker:
        cluster._end([psutil.Process(worker.pid)])
        assert worker.wait(timeout=30) == -signal.SIGKILL


KILLED = """
import psutil, ray, time
from pipelines import cluster
with cluster.connect(num_cpus=1, object_store_memory=128 << 20):
    ray.get(ray.remote(lambda: 1).remote())
    print(*(process.pid for process in psutil.Process().children(recursive=True)), flush=True)
    time.sleep(600)
"""


@pytest.mark.alone
@pytest.mark.slow
def test_nothing_outlives_a_process_that_is_killed_by_30_s():
    """Ray's agents would, by a minute."""
    with subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True) as driver:
        started = [psutil.Process(int(pid)) for pid in driver.stdout.readline().split()]
        assert len(started) >= 4
        driver.kill()
        driver.wait()
        _, alive = psutil.wait_procs(started, timeout=30)
        assert [process.cmdline() for process in alive] == []


@pytest.mark.parametrize("cores", [2, 16, 128])
def test_cpus_for_a_job(monkeypatch, cores):
    """There is always room for the workers and what works beside them; what decodes uses all cores."""
    monkeypatch.setattr(cluster, "cores", lambda: cores)
    assert cluster.cpus_for(1) == 2
    assert cluster.cpus_for(1, all_cores=True) == cores
    assert cluster.cpus_for(3 * 0.5) == 3
    assert cluster.cpus_for(200, all_cores=True) == 201


def test_how_long_a_submitted_job_has_after_a_stop(monkeypatch):
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.delenv("RAY_JOB_STOP_WAIT_TIME_S", raising=False)
    assert cluster.stop_grace() is None
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert cluster.stop_grace() == JobSupervisor.DEFAULT_RAY_JOB_STOP_WAIT_TIME_S
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "90")
    assert cluster.stop_grace() == 90
