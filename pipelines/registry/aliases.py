"""Moves @champion and @previous together: one at a time across machines, and whole even if it is killed half way.

A tag of the registered model (`promotion`) says who may move its aliases, until when, and, while they move, from where to where. MLflow
has no compare-and-set, so the tag is taken as in Fischer's algorithm: it is free; write; wait; whoever then reads its own name has it.
That is exact as long as a write that follows a read takes less than `SETTLE_S`; a process that stands still for longer between the two
takes the tag from its holder, who notices before moving anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import NamedTuple, Self

import mlflow
import psutil
from mlflow.exceptions import MlflowException

from pipelines.tracking import TrackingError

CHAMPION, PREVIOUS = "champion", "previous"
TAG = "promotion"
OUTCOME = "promotion.outcome"
"""Of a version: promoted, refused, rolled back or cut off."""
SETTLE_S = 2.0
EXPIRES_S = 120.0
"""A holder that has not been heard of for so long is gone."""
RENEW_S = 20.0


class Aliases(NamedTuple):
    """Versions."""

    champion: str | None
    previous: str | None


@dataclasses.dataclass(frozen=True)
class Move:
    """A change of the aliases, and what it writes on a version."""

    version: str
    before: Aliases
    after: Aliases
    tags: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Holder:
    """What the tag says."""

    owner: str
    """host:process:random"""
    purpose: str
    expires: float
    """Seconds since 1970, by the holder's clock."""
    move: Move | None = None

    @property
    def is_gone(self) -> bool:
        """Not heard of for too long, or a process of this machine that has ended."""
        host, process, _ = self.owner.rsplit(":", 2)
        ended = host == socket.gethostname() and not psutil.pid_exists(int(process))
        return ended or time.time() > self.expires

    def __str__(self) -> str:
        host, process, _ = self.owner.rsplit(":", 2)
        return f"{self.purpose} by process {process} on {host}"

    @classmethod
    def read(cls, text: str) -> Self:
        data = json.loads(text)
        if move := data.pop("move"):
            move = Move(move["version"], Aliases(*move["before"]), Aliases(*move["after"]), move["tags"])
        return cls(**data, move=move)


class AliasLock:
    """The right to move a model's aliases, from `hold` on. `notes` tells what an earlier holder had left half done.

    Args:
        client: of the registry.
        model: the registered model.
        purpose: for others that want it, e.g. `promotion of version 3`.
    """

    def __init__(self, client: mlflow.MlflowClient, model: str, purpose: str) -> None:
        self._client, self._model = client, model
        self._mine = Holder(f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}", purpose, 0.0)
        self._writing = threading.Lock()
        self.notes: list[str] = []

    @contextlib.contextmanager
    def hold(self, urgent: bool = False) -> Iterator[Self]:
        """Holds the lock for the length of a `with` block, and first brings to an end what was cut off.

        Args:
            urgent: take it from a promotion that still evaluates (which then moves nothing); only one that moves aliases is waited for.

        Raises:
            TrackingError: somebody else has it.
        """
        self._take(urgent)
        ended = threading.Event()
        renewer = threading.Thread(target=self._renew, args=(ended,), name="alias-lock", daemon=True)
        renewer.start()
        try:
            self._settle()
            yield self
        finally:
            ended.set()
            renewer.join()
            with contextlib.suppress(MlflowException):  # a server that is gone; the right expires by itself
                if self._is_mine():
                    self._client.delete_registered_model_tag(self._model, TAG)

    def move(self, move: Move) -> None:
        """Moves both aliases and writes the version's tags.

        Raises:
            TrackingError: the lock was lost, or the aliases are not (any more) what they should be before; nothing was moved.
        """
        if not self._is_mine():
            raise TrackingError(
                f"{self._model}: nothing was moved: meanwhile there is a {holder(self._client, self._model) or 'new state'}"
            )
        if (found := aliases(self._client, self._model)) != move.before:
            raise TrackingError(
                f"{self._model}: nothing was moved: meanwhile the aliases changed from {move.before} to {found}; run it again"
            )
        with self._writing:
            self._write(move)
            self._apply(move.after, move)
            self._write(None)

    def _take(self, urgent: bool) -> None:
        found = holder(self._client, self._model)
        while urgent and found is not None and found.move is not None and not found.is_gone:
            time.sleep(0.2)
            found = holder(self._client, self._model)
        if found is not None and not found.is_gone and not urgent:
            raise TrackingError(
                f"{self._model}: there is a {found}. Wait for it; if it has ended without saying so, its right expires "
                f"{max(0.0, found.expires - time.time()):.0f} s from now"
            )
        self._write(found.move if found else None)
        time.sleep(SETTLE_S)
        if not self._is_mine():
            raise TrackingError(f"{self._model}: there is a {holder(self._client, self._model)} that began at the same time; run it again")

    def _renew(self, ended: threading.Event) -> None:
        while not ended.wait(RENEW_S):
            # An outage is met by trying again, and a lock that was lost is noticed before a move.
            with contextlib.suppress(MlflowException), self._writing:
                found = holder(self._client, self._model)
                if found is None or found.owner != self._mine.owner:
                    return
                self._write(found.move)

    def _settle(self) -> None:
        """Finishes a move that was cut off after @champion had moved, and takes back one that was cut off before."""
        found = holder(self._client, self._model)
        if found is None or found.move is None:
            return
        move = found.move
        if aliases(self._client, self._model).champion == move.after.champion:
            self._apply(move.after, move)
            self.notes.append(
                f"A move of @{CHAMPION} to version {move.after.champion} had been cut off after it had moved; it is finished now"
            )
        else:
            self._apply(move.before, None)
            self._client.set_model_version_tag(self._model, move.version, OUTCOME, "cut off")
            self.notes.append(
                f"A move of @{CHAMPION} to version {move.after.champion} had been cut off before it moved, and is taken back; "
                "run it again to have it"
            )
        self._write(None)

    def _apply(self, target: Aliases, move: Move | None) -> None:
        # @champion last: what is served changes when everything else is in its place.
        for alias, version in ((PREVIOUS, target.previous), (CHAMPION, target.champion)):
            if version is not None:
                self._client.set_registered_model_alias(self._model, alias, version)
            elif getattr(aliases(self._client, self._model), alias) is not None:
                self._client.delete_registered_model_alias(self._model, alias)
        for name, value in (move.tags if move else {}).items():
            self._client.set_model_version_tag(self._model, move.version, name, value)  # type: ignore[union-attr]

    def _write(self, move: Move | None) -> None:
        self._mine = dataclasses.replace(self._mine, expires=time.time() + EXPIRES_S, move=move)
        self._client.set_registered_model_tag(self._model, TAG, json.dumps(dataclasses.asdict(self._mine), ensure_ascii=False))

    def _is_mine(self) -> bool:
        found = holder(self._client, self._model)
        return found is not None and found.owner == self._mine.owner


def holder(client: mlflow.MlflowClient, model: str) -> Holder | None:
    """Who may move a model's aliases just now."""
    text = client.get_registered_model(model).tags.get(TAG)
    return Holder.read(text) if text else None


def aliases(client: mlflow.MlflowClient, model: str) -> Aliases:
    """Where they are."""
    found = client.get_registered_model(model).aliases
    return Aliases(*(str(found[alias]) if alias in found else None for alias in (CHAMPION, PREVIOUS)))
