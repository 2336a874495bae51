"""Jobs as a cluster's users start them: `ray job submit --working-dir . -- python -m jobs.train ...`, on a cluster of the test's own."""

import contextlib
import functools
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import psutil
import pytest
from PIL import Image

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"


def free_ports(count):
    """Ports that were free a moment ago, below those that the system and above those that Ray hands out: nobody is given one meanwhile."""
    free = []
    for port in random.Random(os.getpid()).sample(range(20_000, 32_000), 1000):
        with contextlib.suppress(OSError):
            socket.create_server(("127.0.0.1", port)).close()
            free.append(port)
        if len(free) == count:
            break
    return free


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory):
    """The address of a cluster that `ray start` starts."""
    port, dashboard_port, client_port, agent_port = free_ports(4)
    folder = Path("/tmp") / f"ray-{os.getpid()}"  # sockets lie there: the path must be short
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"RAY_AUTH_MODE": "disabled"}
    command = [
        RAY, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard_port}",
        f"--ray-client-server-port={client_port}", f"--dashboard-agent-listen-port={agent_port}",
        "--num-cpus=4", f"--object-store-memory={256 << 20}", f"--temp-dir={folder}", "--disable-usage-stats",
    ]  # fmt: skip
    log = open(tmp_path_factory.mktemp("cluster") / "log", "w")  # noqa: SIM115
    process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard_port}"
    try:
        for _ in range(600):
            assert process.poll() is None, Path(log.name).read_text()
            try:
                urllib.request.urlopen(f"{address}/api/version", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail(f"the cluster did not start: {Path(log.name).read_text()}")
        yield address
    finally:
        started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for left in psutil.wait_procs(started, timeout=10)[1]:  # on a busy machine workers have outlived their cluster by minutes
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def submit(dashboard, entrypoint, env, *options):
    """`ray job submit`, waiting for the end (unless told not to): (exit code, log)."""
    runtime = json.dumps({"env_vars": env, "excludes": ["/tests", "/runs", "/.gpu"]})
    command = [RAY, "job", "submit", f"--address={dashboard}", "--working-dir=.", "--runtime-env-json", runtime, *options]
    command += ["--", *entrypoint]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"RAY_AUTH_MODE": "disabled"}
    for _ in range(30):
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
        log = result.stdout + result.stderr
        if "No available agent" not in log:  # the part of a young cluster that starts jobs comes up last
            return result.returncode, log
        time.sleep(2)
    pytest.fail(log)


def ask(dashboard, path):
    """What the dashboard answers, as JSON."""
    with urllib.request.urlopen(f"{dashboard}/api/{path}", timeout=30) as answer:
        return json.load(answer)


def log_of(dashboard, job):
    return ask(dashboard, f"jobs/{job}/logs")["logs"]


def wait_for(dashboard, job, text):
    """Until the log of a job has `text`."""
    end = time.monotonic() + 300
    while text not in (log := log_of(dashboard, job)):
        assert ask(dashboard, f"jobs/{job}")["status"] in ("PENDING", "RUNNING"), log
        assert time.monotonic() < end, log
        time.sleep(0.2)


def stop(dashboard, job):
    """`ray job stop`; afterwards no actor of any job lives on this cluster."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"RAY_AUTH_MODE": "disabled"}
    command = [RAY, "job", "stop", f"--address={dashboard}", job]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert ask(dashboard, f"jobs/{job}")["status"] == "STOPPED"
    end = time.monotonic() + 30
    while living := living_actors(dashboard):
        assert time.monotonic() < end, living
        time.sleep(0.5)


def living_actors(dashboard):
    """Names of the classes of actors that are not dead, without the three that Ray Data keeps for the length of a cluster (detached)."""
    actors = ask(dashboard, "v0/actors?limit=1000&detail=true")["data"]["result"]["result"]
    return [actor["class_name"] for actor in actors if actor["state"] != "DEAD" and not actor["is_detached"]]


def write_records(path, count):
    """Squares of one colour, with a question each."""
    rng = np.random.RandomState(0)
    rows = []
    for i in range(count):
        colour = ("red", "blue")[i % 2]
        pixels = np.zeros((64, 64, 3), np.uint8)
        pixels[10:50, 10:50, 0 if colour == "red" else 2] = 150 + rng.randint(100)
        Image.fromarray(pixels).save(path.parent / f"{i}.png")
        messages = [{"role": "user", "content": "Which colour?"}, {"role": "assistant", "content": colour}]
        rows.append({"image": f"{i}.png", "messages": messages})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def prepared(dashboard, tmp_path_factory):
    """A folder with `data`, made by a submitted job."""
    folder = tmp_path_factory.mktemp("prepared")
    write_records(folder / "records.jsonl", 24)
    command = [sys.executable, "-m", "jobs.prepare", "configs/data/records.yaml"]
    code, log = submit(dashboard, [*command, f"records={folder}/records.jsonl", f"output={folder}/data"], {})
    assert code == 0, log
    return folder


@pytest.fixture
def train(prepared, tmp_path):
    """The command that trains, as words, and the variables that it needs."""

    def words(name, *overrides):
        paths = [f"storage={tmp_path}/runs", f"data.datasets.easy_vqa.path={prepared}/data"]
        paths += [f"model.llm.tokenizer.identifier={prepared}/data/tokenizer", f"name={name}"]
        return [sys.executable, "-m", "jobs.train", "configs/train/demo.yaml", *paths, *overrides]

    return words, {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}


@pytest.fixture
def status(tmp_path):
    """The status that MLflow has of the only run, and how many numbers of the loss."""

    def status():
        client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
        (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
        return run.info.status, len(client.get_metric_history(run.info.run_id, "loss"))

    return status


def test_train_as_a_submitted_job(dashboard, train, tmp_path):
    words, env = train
    code, log = submit(dashboard, words("submitted", "steps=4", "log_interval=2", "global_batch_size=4"), env)
    assert code == 0, log
    assert "step 4/4  loss" in log
    assert "trained 4 of 4 steps" in log
    model = tmp_path / "runs" / "submitted" / "step_000004" / "model"
    assert f"model    {model}" in log
    assert {"config.yaml", "model.safetensors", "tokenizer"} <= {p.name for p in model.iterdir()}
    assert (tmp_path / "mlflow.db").is_file()


def test_a_stopped_job_saves_first_when_it_is_given_the_time(dashboard, train, status, tmp_path):
    words, env = train
    command = shlex.join(words("stopped", "steps=100000", "log_interval=2", "global_batch_size=4"))
    shell = f"trap : TERM; {command}; echo exit code $?"  # the shell outlives the signal, to say what it was
    submit(dashboard, ["sh", "-c", shell], env | {"RAY_JOB_STOP_WAIT_TIME_S": "120"}, "--no-wait", "--submission-id=stopped")
    wait_for(dashboard, "stopped", "step 2/100000  loss")
    stop(dashboard, "stopped")
    log = log_of(dashboard, "stopped")
    assert "exit code 143" in log
    assert "`ray job stop` gives this job" not in log
    (step,) = map(int, re.findall(r"stopped after step (\d+); its checkpoint is saved", log))
    assert (tmp_path / "runs" / "stopped" / "latest").read_text() == f"step_{step:06d}"
    assert status() == ("KILLED", step // 2)


def test_a_job_that_is_killed_while_it_ends_is_stopped_all_the_same(dashboard, train, status, tmp_path):
    """Ray's default: SIGKILL three seconds after SIGTERM. A step takes longer."""
    words, env = train
    words = functools.partial(words, "killed", "checkpoint.interval=1", "log_interval=1", "global_batch_size=512", "device_batch_size=16")
    submit(dashboard, words("steps=100000"), env, "--no-wait", "--submission-id=killed")
    wait_for(dashboard, "killed", "step 1 is saved")
    stop(dashboard, "killed")
    log = log_of(dashboard, "killed")
    assert "`ray job stop` gives this job 3 s to save, then kills it" in log
    assert "its checkpoint is saved" not in log
    assert status()[0] == "KILLED"
    newest = (tmp_path / "runs" / "killed" / "latest").read_text()
    step = int(newest.removeprefix("step_"))
    code, log = submit(dashboard, words(f"steps={step}"), env)
    assert code == 0, log
    assert f"step {step} is trained already" in log
    assert (tmp_path / "runs" / "killed" / newest / "model" / "model.safetensors").is_file()
    assert status()[0] == "FINISHED"
