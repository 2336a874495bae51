"""Whole runs through Ray Train: kill, resume, other numbers of workers, SIGTERM, what is left behind."""

import functools
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from batches import RandomLoader, looks, tiny_config

from molmo_core.checkpoint import load_model
from molmo_core.config import ConfigError
from pipelines import cluster, tracking
from pipelines.training.errors import NonFiniteError
from pipelines.training.trainer import run_training

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def storage(empty_database, tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    shutil.copy(empty_database, folder)
    env = {"PYTHONPATH": str(Path(__file__).parent)}  # workers find `batches`
    with pytest.MonkeyPatch.context() as patch, cluster.connect(num_cpus=3, object_store_memory=256 << 20, env=env):
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        yield folder


@pytest.fixture(scope="module")
def undisturbed(storage):
    """8 steps on two workers, with validation and samples in between (which the runs that are compared with it do without)."""
    return run_training(tiny_config(storage, name="undisturbed", steps=8, num_workers=2, **looks(storage / "looks")), RandomLoader)


def losses(result):
    """Loss by step; of a step that was repeated, the last."""
    return {step: values["loss"] for step, values in result.metrics if "loss" in values}


def test_a_run_leaves_a_model_numbers_and_pictures(undisturbed, storage):
    assert (undisturbed.step, undisturbed.finished) == (8, True)
    assert list(losses(undisturbed)) == list(range(1, 9))
    model = load_model(undisturbed.checkpoint)
    config = tiny_config(storage)
    batch = next(iter(RandomLoader(config.data, config.model, 4, 64, config.seed, 0, 1)))
    assert model(**batch).loss < losses(undisturbed)[1]
    client = tracking.client()
    assert {"training.png", "config.yaml"} <= {a.path for a in client.list_artifacts(undisturbed.run_id)}
    pictures = [f"samples/step_00000{step}.png" for step in (3, 6, 8)]
    assert [a.path for a in client.list_artifacts(undisturbed.run_id, "samples")] == pictures
    assert len(client.get_metric_history(undisturbed.run_id, "validation/loss")) == 3
    assert client.get_run(undisturbed.run_id).data.params["model.llm.d_model"] == "32"
    version = tracking.register(undisturbed.checkpoint, "tiny", "candidate", undisturbed.run_id)
    assert tracking.client().get_model_version("tiny", version).run_id == undisturbed.run_id


def test_a_killed_worker_changes_nothing(undisturbed, storage, capsys):
    """Worker 1 dies in step 6; all begin again after the checkpoint of step 4 (or 2, if 4 was not yet committed). Before that the driver's
    inbox has died; what is told later is heard of nevertheless."""
    loader = functools.partial(KillsTheInbox, die_at=6, marker=str(storage / "died"))
    config = tiny_config(storage, name="killed", steps=8, num_workers=2, max_failures=1)
    config.checkpoint.interval, config.checkpoint.keep = 2, 2
    result = run_training(config, loader)
    assert (storage / "died").exists()
    told = capsys.readouterr().out
    assert "workers failed (rank 1): " in told
    assert "again from the newest checkpoint: failure 1, max_failures 1" in told
    assert len(result.metrics) > 8
    assert losses(result) == losses(undisturbed)
    weights = [load_model(r.checkpoint).state_dict() for r in (result, undisturbed)]
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights)))
    assert sorted(p.name for p in (storage / "killed").glob("step_*")) == ["step_000006", "step_000008"]


def test_terminated_on_one_worker_and_resumed_on_two(undisturbed, storage):
    config = tiny_config(storage, name="moved", steps=8, num_workers=1)

    def terminate():
        while not started.wait(0.1):
            if list(Path(storage).glob("moved/slow_*")):
                started.set()
        os.kill(os.getpid(), signal.SIGTERM)

    started = threading.Event()
    killer = threading.Thread(target=terminate, daemon=True)
    killer.start()
    first = run_training(config, functools.partial(Slow, marker=str(storage / "moved" / "slow_")))
    killer.join()
    assert 1 <= first.step < 8
    assert (first.finished, first.checkpoint, first.stopped_by) == (False, None, signal.SIGTERM)
    assert tracking.client().get_run(first.run_id).info.status == "KILLED"
    second = run_training(tiny_config(storage, name="moved", steps=8, num_workers=2), RandomLoader)
    together = losses(first) | losses(second)
    assert list(losses(second)) == list(range(first.step + 1, 9))
    assert list(together) == list(range(1, 9))
    assert list(together.values()) == pytest.approx(list(losses(undisturbed).values()), rel=1e-4)
    assert second.run_id == first.run_id
    assert tracking.client().get_run(first.run_id).info.status == "FINISHED"
    with pytest.raises(ConfigError, match=r"run with other settings.*\n  seed: 6198 then, 1 now"):
        run_training(tiny_config(storage, name="moved", steps=8, seed=1), RandomLoader)


class KillsTheInbox(RandomLoader):
    """The actor that takes what workers tell dies while they take step 3."""

    def __iter__(self):
        for batch in super().__iter__():
            if self.rank == 0 and self.positions[self.owned[0]] == 3:
                inboxes = [p for p in psutil.Process().parent().children() if "ray::Inbox" in " ".join(p.cmdline())]
                assert inboxes
                time.sleep(2.0)  # the driver has fetched what was told so far: that would be lost
                for inbox in inboxes:  # another one may be of the run before
                    inbox.kill()
            yield batch


class Slow(RandomLoader):
    """From step 3 on a batch takes its time, and a file says so."""

    def __iter__(self):
        for batch in super().__iter__():
            step = self.positions[0]
            if step >= 3:
                Path(f"{self.marker}{step}").touch()
                self.delay = 1.0
            yield batch


def test_errors_reach_the_driver_without_retries(storage):
    with pytest.raises(NonFiniteError, match="step 2: loss nan"):
        run_training(tiny_config(storage, name="poisoned", steps=8, num_workers=1), functools.partial(RandomLoader, poison_at=2))
    with pytest.raises(ConfigError, match=r"num_workers=4 with 1 CPUs each do not fit into the cluster \(3 CPUs"):
        run_training(tiny_config(storage, name="large", num_workers=4), RandomLoader)
