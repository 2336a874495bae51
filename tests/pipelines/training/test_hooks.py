"""What the loop carries beside the step: steps left out, spikes, stuck steps, traces, preemption. In one process, without Ray."""

import functools
import gzip
import json
import threading
from types import SimpleNamespace

import pytest
import ray.train
import ray.train.torch
import torch
from batches import RandomLoader, looks, tiny_config

from molmo_core.checkpoint import load_model
from molmo_core.config import ConfigError
from pipelines.training import health, loop, preemption
from pipelines.training.config import CheckpointConfig, EmaConfig, ProfileConfig
from pipelines.training.errors import NonFiniteError
from pipelines.training.events import Done, Metrics, Note, Saved, Started, Stuck, Unusual
from pipelines.training.health import Health
from pipelines.training.hooks import Step


class Recorder(list):
    stop_requested = False
    send = alarm = list.append

    def note(self, text):
        self.append(Note(text))

    def heartbeat(self, step):
        pass

    def only(self, kind):
        return [event for event in self if isinstance(event, kind)]

    def model(self):
        return load_model(self.only(Done)[0].model).state_dict()


@pytest.fixture
def train(monkeypatch, tmp_path):
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr("pipelines.training.preemption.ASK_S", float("inf"))  # here is no Ray Train to ask

    def train(loader=RandomLoader, recorder=None, name="run", **changes):
        recorder = Recorder() if recorder is None else recorder
        loop.train(tiny_config(tmp_path, name=name, **changes), loader, recorder)
        return recorder

    return train


class Poisoned(RandomLoader):
    """Steps with a pixel that is not a number."""

    def __init__(self, *arguments, steps, **settings):
        super().__init__(*arguments, **settings)
        self.steps = steps

    def __iter__(self):
        for batch in super().__iter__():
            if self.positions[self.owned[0]] in self.steps and "images" in batch:
                batch["images"][0, 0, 0, 0] = float("nan")
            yield batch


@pytest.mark.parametrize("muon", [None, 0.02])
def test_a_skipped_step_changes_nothing_and_is_counted(train, muon):
    """Weights, moments and momentum after a poisoned last step are those before it, bit by bit."""
    optim = tiny_config("-").optim
    for group in ("connector", "vit", "llm"):
        optim.of(group).muon_lr = muon
    loader = functools.partial(Poisoned, steps=(4,))
    poisoned = train(loader, name="poisoned", steps=4, on_non_finite="skip", optim=optim)
    plain = train(name="plain", steps=3, optim=optim).model()
    assert all(torch.equal(plain[name], value) for name, value in poisoned.model().items())
    (unusual,) = poisoned.only(Unusual)
    assert unusual.step == 4
    assert unusual.text.startswith("loss nan, gradient norm connector nan")
    assert unusual.examples == [f"random[{stream}.4]" for stream in range(4)]
    logged = [event.values for event in poisoned.only(Metrics)]
    assert [values.get("skipped_steps") for values in logged] == [None, None, None, 1.0]
    assert "loss" not in logged[3], "there is nothing to take the mean of"
    resumed = train(loader, name="poisoned", steps=6, on_non_finite="skip", optim=optim)
    undisturbed = train(loader, name="undisturbed", steps=6, on_non_finite="skip", optim=optim)
    assert all(torch.equal(value, undisturbed.model()[name]) for name, value in resumed.model().items())
    assert resumed.only(Metrics)[-1].values["skipped_steps"] == 1.0


def test_skipping_for_ever_is_refused(train, monkeypatch):
    monkeypatch.setattr(health, "MOST_SKIPPED", 2)
    loader = functools.partial(Poisoned, steps=range(2, 100))
    with pytest.raises(NonFiniteError, match=r"step 3: loss nan.* nor were the 1 before it; the last checkpoint is step_000002\. "):
        train(loader, steps=20, on_non_finite="skip", checkpoint=CheckpointConfig(interval=1))


def watched(losses, on_spike="report", **config):
    """A Health that has seen losses, with what it sent, and whether the last step was left out."""
    events = []
    watch = Health(
        SimpleNamespace(on_spike=on_spike, on_non_finite="skip", **config), torch.device("cpu"), lambda _: ["x[1]"], events.append, str
    )
    for number, loss in enumerate(losses, 1):
        step = Step(number, False, torch.tensor(loss), {"llm": torch.tensor(1.0)}, {})
        watch.after_backward(step)
        watch.after_step(step)
    watch.at_interval()
    return watch, events, step.left_out.item()


NORMAL = (2.0 + 0.1 * torch.randn(128, generator=torch.Generator().manual_seed(0))).tolist()


def test_a_spike_is_six_deviations_above_128_losses():
    assert watched([*NORMAL[:-1], 9.0])[1] == [], "127 are too few"
    _, events, left_out = watched([*NORMAL, 9.0])
    assert (events[0].step, events[0].examples, left_out) == (129, ["x[1]"], False)
    assert "standard deviations above the mean 2" in events[0].text
    assert watched([*NORMAL, 2.5, 1.0, 0.0])[1] == [], "5 deviations, or lower"


def test_a_spike_that_is_left_out_does_not_count_among_the_losses():
    watch, events, left_out = watched([*NORMAL, 9.0, 9.0, 9.0], on_spike="skip")
    assert ([event.step for event in events], left_out, watch.skipped) == ([129, 130, 131], True, 3)
    assert watch.state()["losses"] == pytest.approx(NORMAL)
    taken, _, _ = watched([*NORMAL, 9.0])
    assert taken.state()["losses"] == pytest.approx([*NORMAL[1:], 9.0])


def test_nothing_is_read_of_a_step_before_the_next_one():
    watch, events, _ = watched([1.0])
    step = Step(2, False, torch.tensor(torch.nan), {"llm": torch.tensor(1.0)}, {})
    watch.after_backward(step)
    watch.after_step(step)
    assert (events, step.left_out.item()) == ([], True)
    watch.state()
    assert [event.step for event in events] == [2], "before a save, everything is"


def test_a_stuck_step_is_told_with_the_stack_of_its_rank(train):
    told = threading.Event()

    class Waiting(RandomLoader):
        def __iter__(self):
            for batch in super().__iter__():
                if self.positions[0] == 3:
                    assert told.wait(60)
                yield batch

    class Telling(Recorder):
        def alarm(self, event):
            self.append(event)
            if event.step == 2:
                told.set()

    recorder = train(Waiting, Telling(), steps=4, stuck_after=0.5)
    stuck = [event for event in recorder.only(Stuck) if event.step == 2]
    assert len(stuck) == 1, "once a step"
    assert stuck[0].rank == 0
    assert stuck[0].seconds > 0.5
    assert "told.wait(60)" in stuck[0].stack
    assert "rank 0: no step has ended for" in str(stuck[0])
    assert recorder.only(Done)


def test_a_trace_of_the_steps_asked_for(train, tmp_path):
    recorder = train(steps=5, profile=ProfileConfig(steps=(3, 4)))
    assert "steps 3 to 4 are traced" in recorder.only(Note)[0].text
    (file,) = (tmp_path / "run" / "traces").iterdir()
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "Optimizer.step#AdamW.step" for event in events) == 2
    with pytest.raises(ConfigError, match="the first step comes after the last"):
        ProfileConfig(steps=(5, 4))


def test_a_node_that_is_taken_away_is_saved_for_once(train, monkeypatch):
    info = SimpleNamespace(preempted_node_ids=["n1"], preempted_ranks=[1, 2], deadline_ms=None)
    monkeypatch.setattr(preemption, "ASK_S", 0.0)
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: info)
    recorder = train(steps=4)
    assert [note.text for note in recorder.only(Note)] == [
        "the node of rank 1, 2 is going to be taken away: a checkpoint is saved, and the run goes on elsewhere"
    ]
    assert recorder.only(Saved) == [Saved(1), Saved(4)]
    assert recorder.only(Started) == [Started(0)]


def test_the_average_of_the_weights_is_saved_validated_and_exported(train, tmp_path):
    """Against the formula, over a step that is left out, resumed and begun late."""
    steps = {}
    for step in range(1, 5):
        settings = {"name": "plain", "steps": step, "on_non_finite": "skip"}
        steps[step] = train(functools.partial(Poisoned, steps=(2,)), **settings).model()
    settings = {"steps": 4, "on_non_finite": "skip", "ema": EmaConfig(decay=0.75)} | looks(tmp_path / "looks")
    del settings["samples"]
    settings["validation"].batches = 1  # the second one is poisoned, too
    late = train(functools.partial(Poisoned, steps=(2,)), name="plain", **settings | {"steps": 5}).model()
    whole = train(functools.partial(Poisoned, steps=(2,)), name="whole", **settings)
    train(functools.partial(Poisoned, steps=(2,)), name="parts", **settings | {"steps": 3})
    parts = train(functools.partial(Poisoned, steps=(2,)), name="parts", **settings)
    assert all(torch.equal(parts.model()[name], weight) for name, weight in whole.model().items())
    average = train(functools.partial(Poisoned, steps=(1,)), name="first", steps=1, on_non_finite="skip").model()  # as it was drawn
    for step in (1, 3, 4):
        average = {name: 0.75 * average[name] + 0.25 * weight for name, weight in steps[step].items()}
    for name, weight in average.items():
        torch.testing.assert_close(whole.model()[name], weight, msg=name)
    (validated,) = [event.values for event in whole.only(Metrics) if event.step == 4 and "validation/loss" in event.values]
    assert validated["validation/loss_ema"] > validated["validation/loss"], "it lags behind"
    last = train(functools.partial(Poisoned, steps=(2,)), name="last", **settings | {"ema": EmaConfig(0.75, export=False)}).model()
    assert all(torch.equal(steps[4][name], weight) for name, weight in last.items())
    plain = train(functools.partial(Poisoned, steps=(2,)), name="last", **settings | {"steps": 5, "ema": None}).model()
    for name, weight in late.items():
        torch.testing.assert_close(weight, 0.75 * steps[4][name] + 0.25 * plain[name], msg=f"begun after step 4: {name}")
