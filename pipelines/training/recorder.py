"""MLflow as an observer: what a run logs is sent from a thread, so that no outage stops, delays or ends training.

While the server does not answer, entries wait and are tried again; the run says so once. What could not be sent when the run ends is
kept in its folder (`unsent/`), and its numbers are sent when the run is continued.
"""

from __future__ import annotations

import collections
import io
import json
import threading
import time
from collections.abc import Callable
from typing import Any

from mlflow.exceptions import MlflowException
from PIL import Image

from pipelines import tracking
from pipelines.names import masked
from pipelines.training.storage import Storage

RETRY_S = 5.0
WARN_S = 10.0
"""It is said when nothing has got through for so long."""
PATIENCE_S = 30.0
"""At the end of a run: how long nothing may get through before the rest is kept instead."""
MAX_METRICS, MAX_PICTURES = 20_000, 50
"""Entries that wait at most (some 20 MB, and as much of pictures); beyond them the oldest are dropped, and counted."""
UNSENT = "unsent"
UNSENT_METRICS = f"{UNSENT}/metrics.jsonl"
REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")

Draw = Callable[[], Image.Image]


class Recorder:
    """Logs into an MLflow run. No method waits for the server, but for `close`, which does for a bounded time."""

    def __init__(self, run: tracking.Run, storage: Storage, say: Callable[[str], None]):
        self.run, self.storage, self.say = run, storage, say
        self._metrics: collections.deque[tuple[int, dict[str, float], int]] = collections.deque(self._kept_before())
        """Step, values, milliseconds since 1970."""
        self._statuses: collections.deque[tuple[str]] = collections.deque()
        self._pictures: collections.deque[tuple[str, Draw]] = collections.deque()
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._moved = time.monotonic()
        """When an entry was sent, or the first one came into empty queues."""
        self._dropped, self._warned, self._problem = 0, False, "it does not answer"
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
        self._thread.start()

    def metrics(self, step: int, values: dict[str, float], when: int) -> None:
        """Logs numbers of a step; `when` they were measured: milliseconds since 1970. The same entry sent twice is there once."""
        self._put(self._metrics, (step, values, when), MAX_METRICS)

    def picture(self, name: str, draw: Draw) -> None:
        """Logs a picture, e.g. as `samples/step_000100.png`. It is drawn in the thread, too; one that cannot be drawn costs a line."""
        self._put(self._pictures, (name, draw), MAX_PICTURES)

    def ends(self, status: str) -> None:
        """Tells MLflow already that the run will have ended so: this process may be killed before `close`. Later entries still arrive."""
        with self._changed:
            self._statuses.append((status,))
            self._changed.notify()

    def look(self) -> None:
        """Says once that the server does not answer, and that it does again. To be called now and then."""
        waiting = self._waiting()
        if waiting and not self._warned and time.monotonic() - self._moved > WARN_S:
            self._warned = True
            self.say(
                f"MLflow ({masked(tracking.tracking_uri())}): {self._problem}. Training continues; what it logs is kept and sent later."
            )
        elif self._warned and not waiting:
            self._warned = False
            self.say("MLflow answers again, and has everything.")

    def close(self, status: str) -> None:
        """Sends what is left and ends the MLflow run as FINISHED, KILLED or FAILED; says what could not be sent, and where it is."""
        self._moved = time.monotonic()
        self._closing.set()
        with self._changed:
            self._statuses.clear()  # this one counts
            self._changed.notify()
        while self._thread.is_alive() and time.monotonic() - self._moved < PATIENCE_S:
            self._thread.join(0.1)
        if self._dropped:
            self.say(f"{self._dropped} entries are not in MLflow: more had to wait than are kept.")
        if waiting := self._waiting():
            kept = f"{waiting} entries were not sent; they are in {self.storage.url}/{UNSENT}. "
            self._keep(pictures=True)
        elif self._ended(status):
            self.storage.delete(UNSENT_METRICS)
            return
        else:
            kept = ""
        where = masked(tracking.tracking_uri())
        self.say(f"MLflow ({where}): {self._problem}. {kept}The run stays RUNNING there until the same command ends it.")

    def _kept_before(self) -> list[Any]:
        try:
            return [tuple(json.loads(line)) for line in (self.storage.read(UNSENT_METRICS) or "").splitlines()]
        except ValueError:
            self.say(f"{self.storage.url}/{UNSENT_METRICS} is damaged and is not sent.")
            return []

    def _ended(self, status: str) -> bool:
        """Whether MLflow could be told, within PATIENCE_S, that the run is over."""
        ended = threading.Event()

        def finish() -> None:
            try:
                self.run.finish(status)
                ended.set()
            except Exception as error:
                self._problem = reason(error)

        thread = threading.Thread(target=finish, daemon=True)
        thread.start()
        thread.join(PATIENCE_S)
        return ended.is_set()

    def _put(self, queue: collections.deque[Any], entry: Any, limit: int) -> None:
        with self._changed:
            if not self._metrics and not self._pictures:
                self._moved = time.monotonic()
            queue.append(entry)
            if len(queue) > limit:
                queue.popleft()
                self._dropped += 1
            self._changed.notify()

    def _waiting(self) -> int:
        with self._changed:
            return len(self._metrics) + len(self._pictures)

    def _send_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._statuses or self._metrics or self._pictures or self._closing.is_set())
                queue: collections.deque[Any] = self._statuses or self._metrics or self._pictures
                if not queue:
                    return
                entry = queue[0]
            if self._send(entry):
                with self._changed:
                    if queue and queue[0] is entry:  # it may have been dropped meanwhile
                        queue.popleft()
                    self._moved = time.monotonic()
            else:
                self._keep()
                if self._closing.wait(RETRY_S):
                    time.sleep(1.0)

    def _send(self, entry: tuple[Any, ...]) -> bool:
        """Whether an entry is done with: sent, or impossible to send."""
        try:
            if len(entry) == 1:
                self.run.finish(*entry)
            elif len(entry) == 3:
                step, values, when = entry
                self.run.log_metrics(values, step, when)
            elif picture := self._drawn(*entry):
                self.run.log_picture(picture, entry[0])
        except Exception as error:  # of HTTP, of a database, of a disk: MLflow wraps some of them
            if isinstance(error, MlflowException) and error.error_code in REFUSED:
                self.say(f"MLflow refuses an entry: {reason(error)}")
                return True
            self._problem = reason(error)
            return False
        return True

    def _drawn(self, name: str, draw: Draw) -> Image.Image | None:
        try:
            return draw()
        except MlflowException:
            raise  # a picture of what MLflow holds
        except Exception as error:
            self.say(f"{name} cannot be drawn: {reason(error)}")
            return None

    def _keep(self, pictures: bool = False) -> None:
        """Writes what waits into the run's folder."""
        with self._changed:
            metrics, waiting = list(self._metrics), list(self._pictures)
        try:
            self.storage.write(UNSENT_METRICS, "".join(json.dumps(entry) + "\n" for entry in metrics))
            for name, draw in waiting if pictures else ():
                try:
                    self._write_picture(name, draw())
                except MlflowException as error:
                    self.say(f"{name} cannot be drawn: {reason(error)}")
        except Exception as error:
            self.say(f"{self.storage.url}/{UNSENT} cannot be written: {reason(error)}")

    def _write_picture(self, name: str, picture: Image.Image) -> None:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        self.storage.write(f"{UNSENT}/{name}", buffer.getvalue())


def reason(error: Exception) -> str:
    """An error in a line."""
    text = str(error.message if isinstance(error, MlflowException) else error).strip()
    return (text.splitlines() or [type(error).__name__])[0][:300]
