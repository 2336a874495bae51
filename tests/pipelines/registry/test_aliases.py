"""Moving @champion and @previous: one at a time, and whole wherever it is cut off. On a real database."""

import os
import shutil
import threading
import time

import mlflow
import pytest

from pipelines import tracking
from pipelines.registry import aliases as module
from pipelines.registry.aliases import OUTCOME, TAG, Aliases, AliasLock, Holder, Move, aliases, holder
from pipelines.registry.promote import BEFORE, REPLACED, rollback
from pipelines.tracking import TrackingError

BEFORE_IT, AFTER_IT = Aliases("2", "1"), Aliases("3", "2")
MOVE = Move("3", BEFORE_IT, AFTER_IT, {OUTCOME: "promoted", REPLACED: "2", BEFORE: "1"})
WRITING = ("set_registered_model_tag", "set_registered_model_alias", "set_model_version_tag")


@pytest.fixture(scope="module")
def client(empty_database, tmp_path_factory):
    folder = tmp_path_factory.mktemp("aliases")
    shutil.copy(empty_database, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        yield tracking.client()


@pytest.fixture
def model(client, request, monkeypatch):
    """A model of three versions, of which 2 is champion and 1 the one before."""
    monkeypatch.setattr(module, "SETTLE_S", 0.05)
    name = request.node.name.replace("/", " ").replace(":", " ")
    client.create_registered_model(name)
    for _ in range(3):
        client.create_model_version(name, source="file:///nowhere")
    client.set_registered_model_alias(name, "champion", "2")
    client.set_registered_model_alias(name, "previous", "1")
    return name


def test_promoted_and_rolled_back(client, model):
    with AliasLock(client, model, "promotion of version 3").hold() as lock:
        assert str(holder(client, model)) == f"promotion of version 3 by process {os.getpid()} on {os.uname().nodename}"
        lock.move(MOVE)
    assert (aliases(client, model), holder(client, model)) == (AFTER_IT, None)
    assert client.get_model_version(model, "3").tags[OUTCOME] == "promoted"
    assert rollback(model, dry_run=True)[:2] == ("3", "2")
    assert aliases(client, model) == AFTER_IT
    assert rollback(model)[:2] == ("3", "2")
    assert aliases(client, model) == BEFORE_IT
    assert client.get_model_version(model, "3").tags[OUTCOME] == "rolled back"
    assert rollback(model)[:2] == ("2", "1"), "the one before was champion, too"
    with pytest.raises(TrackingError, match="has nothing to go back to: @champion is 1, @previous nowhere"):
        rollback(model)
    with pytest.raises(TrackingError, match="no registered model 'unknown'"):
        rollback("unknown")


def dies_at(call, act):
    """Runs `act` in a process that is gone right before its n-th writing call: 9; or came to its end: 0."""
    pid = os.fork()
    if pid == 0:
        made = 0

        def counted(original):
            def wrapped(*arguments):
                nonlocal made
                made += 1
                if made == call:
                    os._exit(9)
                return original(*arguments)

            return wrapped

        for name in WRITING:
            setattr(mlflow.MlflowClient, name, counted(getattr(mlflow.MlflowClient, name)))
        try:
            act()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_killed_anywhere_it_is_finished_or_taken_back(client, model):
    def promote():
        with AliasLock(tracking.client(), model, "promotion of version 3").hold() as lock:
            lock.move(MOVE)

    outcomes = []
    for call in range(1, 12):
        code = dies_at(call, promote)
        lock = AliasLock(client, model, "the next one")
        with lock.hold():
            found = aliases(client, model)
        assert found in (BEFORE_IT, AFTER_IT)
        assert holder(client, model) is None
        if found == AFTER_IT:
            assert client.get_model_version(model, "3").tags.items() >= MOVE.tags.items(), "why it was promoted is there, too"
        outcomes.append((found == AFTER_IT, " ".join(lock.notes)))
        if code == 0:
            break
        client.set_registered_model_alias(model, "champion", "2")
        client.set_registered_model_alias(model, "previous", "1")
        for tag in MOVE.tags:
            client.delete_model_version_tag(model, "3", tag)
    assert code == 0, "it made fewer calls than that"
    moved = [moved for moved, _ in outcomes]
    assert moved == sorted(moved)
    assert {True, False} == set(moved)
    assert any("taken back; run it again to have it" in note for _, note in outcomes)
    assert any("it is finished now" in note for _, note in outcomes)


def test_of_two_at_once_one_moves(client, model, monkeypatch):
    monkeypatch.setattr(module, "SETTLE_S", 1.0)
    ready, results = threading.Barrier(2), []

    def promote():
        lock = AliasLock(tracking.client(), model, "promotion of version 3")
        ready.wait()
        try:
            with lock.hold():
                lock.move(MOVE)
            results.append("moved")
        except TrackingError as error:
            results.append(str(error))

    threads = [threading.Thread(target=promote) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.count("moved") == 1, results
    assert aliases(client, model) == AFTER_IT


def test_others_are_told_who_has_it(client, model):
    told = r"there is a promotion of version 3 by process \d+ on .*expires 1\d\d s from now"
    with AliasLock(client, model, "promotion of version 3").hold(), pytest.raises(TrackingError, match=told):
        AliasLock(client, model, "another").hold().__enter__()
    assert holder(client, model) is None


def test_a_rollback_overtakes_a_promotion_that_evaluates(client, model):
    with AliasLock(client, model, "promotion of version 3").hold() as lock:
        assert rollback(model)[:2] == ("2", "1")
        with pytest.raises(TrackingError, match="nothing was moved"):
            lock.move(MOVE)
    assert (aliases(client, model), holder(client, model)) == (Aliases("1", None), None)


def test_an_alias_that_somebody_moved_is_not_overwritten(client, model):
    with AliasLock(client, model, "promotion of version 3").hold() as lock:
        client.set_registered_model_alias(model, "champion", "1")
        with pytest.raises(TrackingError, match="run it again"):
            lock.move(MOVE)
    assert aliases(client, model) == Aliases("1", "1")


@pytest.mark.parametrize(("owner", "expires", "gone"), [("elsewhere:1:x", 60, False), ("elsewhere:1:x", -1, True), ("here:0:x", 60, True)])
def test_who_is_gone(owner, expires, gone):
    """Of this machine's processes it is seen at once (process 0 is none that one could see)."""
    assert not os.path.exists("/proc/0")
    owner = owner.replace("here", os.uname().nodename) if owner.startswith("here") else owner
    assert Holder(owner.replace(":0:", ":4194305:"), "promotion", time.time() + expires).is_gone == gone


def test_the_right_is_renewed_while_it_is_held(client, model, monkeypatch):
    monkeypatch.setattr(module, "RENEW_S", 0.05)
    with AliasLock(client, model, "promotion of version 3").hold():
        first = holder(client, model).expires
        deadline = time.monotonic() + 30
        while holder(client, model).expires == first:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert TAG not in client.get_registered_model(model).tags
