"""Who may run in `<storage>/<name>`, and what has run there: a lock, the run's settings and its MLflow run."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException

from molmo_core.config import ConfigError, flatten
from pipelines import tracking
from pipelines.names import file_name, masked
from pipelines.training.config import TrainConfig
from pipelines.training.provenance import data_reports, environment, git_revision
from pipelines.training.storage import Storage

RUN_FILE = "run.json"
LOCK_FILE = ".lock"


class RunFolder:
    """The folder of a run, seen from the driver. Checkpoints are beside what is written here."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.storage = Storage(config.storage, config.name)
        self.notes: list[str] = []
        """What a person should know of how the run was opened."""

    def check_tracking(self) -> None:
        """Raises ConfigError if MLflow does not answer or would refuse the run: before anything is written or started."""
        try:
            tracking.known_experiment(tracking.client(), self.config.experiment)
        except MlflowException as error:
            raise ConfigError(
                f"MLFLOW_TRACKING_URI={masked(tracking.tracking_uri())}: not a working MLflow server ({error.message})"
            ) from None

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps every other training out of this folder. The kernel releases the lock when this process ends, however it ends.

        On a disk, a shared one included, the lock is a file in the folder. Storages behind a URL have none: there the lock is on this
        machine's disk, and keeps apart the trainings of this machine only.

        Raises:
            ConfigError: another training holds it (the message says which), or the folder cannot be written.
        """
        path = self._lock_file()
        with writing(self.storage.url):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        with open(path, "r+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"{self.storage.url}: another training of this name runs ({file.read().strip() or 'it has just begun'}). Wait for it, "
                    "stop it, or give this run another name (name=...)."
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                    raise
                self.notes.append(f"{path}: this filesystem has no locks; make sure that no other training of this name runs")
            file.truncate(0)
            with contextlib.suppress(OSError):  # who holds it is a courtesy: a full disk has no room for it
                file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
                file.flush()
            yield

    def check(self) -> None:
        """Compares the settings with those that the folder's run began with.

        Raises:
            ConfigError: it has another model, data, seed or batch.
        """
        known = self._read()
        if known is None:
            return
        old, new = flatten(known["identity"]), flatten(_plain(self.config.identity()))
        changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        if changed:
            lines = [f"  {key}: {old.get(key)!r} then, {new.get(key)!r} now" for key in changed[:10]]
            raise ConfigError(
                f"{self.storage.url} holds a run with other settings; a run can only continue with the same ones\n"
                + "\n".join(lines)
                + "\nGive the new run another name (name=...), or delete the folder to begin anew."
            )

    def open_run(self) -> tracking.Run:
        """The MLflow run: the one that this folder's run began, or a new one, after which the folder belongs to this run.

        Raises:
            ConfigError: see `check`; or the tracking server does not answer, or refuses the run. Then nothing is left in the folder.
        """
        self.check()
        run = self._mlflow_run()
        try:
            run.log_params(self.config.as_dict())
            with tempfile.TemporaryDirectory() as temporary:
                file = Path(temporary) / "config.yaml"
                self.config.save(file)
                run.log_file(file)
                text = file.read_text(encoding="utf-8")
                self._log_provenance(run, Path(temporary))
            with writing(self.storage.url):
                self.storage.write("config.yaml", text)
                self.storage.write(RUN_FILE, json.dumps({"mlflow_run": run.id, "identity": _plain(self.config.identity())}))
        except MlflowException as error:
            _abandon(run)
            raise ConfigError(f"MLflow ({masked(tracking.tracking_uri())}) refuses the run {self.config.name!r}: {error.message}") from None
        except BaseException:
            _abandon(run)
            raise
        return run

    def _log_provenance(self, run: tracking.Run, folder: Path) -> None:
        """Adds the environment, the revision of the code and the reports of the data; of a run that is continued the latest count."""
        file = folder / "environment.json"
        file.write_text(json.dumps(environment(), indent=1), encoding="utf-8")
        run.log_file(file)
        for name, report in data_reports(self.config.data).items():
            run.log_file(report, f"data/{file_name(name)}")
        if (revision := git_revision()) is not None:
            run.client.set_tag(run.id, "mlflow.source.git.commit", revision)

    def _mlflow_run(self) -> tracking.Run:
        known = self._read()
        try:
            if known is not None:
                try:
                    return tracking.Run(self.config.experiment, self.config.name, run_id=known["mlflow_run"])
                except tracking.TrackingError as error:
                    self.notes.append(f"MLflow: {error}. What is logged from here on is in a new run.")
            return tracking.Run(self.config.experiment, self.config.name)
        except MlflowException as error:
            raise ConfigError(f"MLflow ({masked(tracking.tracking_uri())}) refuses the run {self.config.name!r}: {error.message}") from None

    def _read(self) -> dict[str, Any] | None:
        text = self.storage.read(RUN_FILE)
        try:
            return None if text is None else json.loads(text)
        except ValueError:
            raise ConfigError(
                f"{self.storage.url}/{RUN_FILE} is damaged, so it is not known what ran there. Delete that file to continue with the "
                "settings of now, or give the new run another name (name=...)."
            ) from None

    def _lock_file(self) -> Path:
        if self.storage.local is not None:
            return self.storage.local / LOCK_FILE
        name = hashlib.sha256(self.storage.url.encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"molmo-{os.getuid()}" / f"{name}.lock"


@contextlib.contextmanager
def writing(url: str) -> Iterator[None]:
    """Around what writes into a storage for the first time: whether that is possible is a matter of the configuration."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"storage: {url} cannot be written: {error.strerror or error}") from None


def _abandon(run: tracking.Run) -> None:
    """Ends a run that did not begin."""
    with contextlib.suppress(Exception):  # the error that is on its way says more
        run.finish("FAILED")


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))
