"""The loop in one process, without Ray: what a step computes, what is logged, when it stops, what is saved."""

import functools
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import ray.train
import ray.train.torch
import torch
from batches import RandomLoader, looks, tiny_config, tiny_model

from molmo_core.checkpoint import load_model
from molmo_core.config import ConfigError
from pipelines.data.records import media
from pipelines.training import loop, meter, preemption
from pipelines.training.build import build
from pipelines.training.config import CheckpointConfig
from pipelines.training.errors import NonFiniteError
from pipelines.training.events import Done, Metrics, Note, Samples, Saved, Started, Stopped
from pipelines.training.mesh import Mesh


class Recorder:
    """Stands in for the Reporter."""

    stop_requested = False

    def __init__(self):
        self.events = []

    def send(self, event):
        self.events.append(event)

    def note(self, text):
        self.send(Note(text))

    alarm = send

    def heartbeat(self, step):
        pass

    def values(self, name):
        return [values[name] for values in self.logged() if name in values]

    def logged(self):
        return [event.values for event in self.events if isinstance(event, Metrics)]

    def only(self, *kinds):
        return [event for event in self.events if isinstance(event, kinds)]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Trains in this process; every call is a run of its own, unless it gives a `name`."""
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(preemption, "ASK_S", math.inf)  # there is no Ray to ask, however slow the machine
    names, models, build = itertools.count(), [], loop.build
    monkeypatch.setattr(loop, "build", lambda *arguments: models.append(build(*arguments)) or models[-1])

    def train(loader=RandomLoader, **changes):
        recorder = Recorder()
        loop.train(tiny_config(tmp_path, **{"name": f"run{next(names)}"} | changes), loader, recorder)
        recorder.model = models[-1]
        return recorder

    return train


def test_loss_falls_and_everything_is_logged(run):
    recorder = run(steps=15, loader=SameBatch)
    losses = recorder.values("loss")
    assert len(losses) == 15
    assert losses[0] == pytest.approx(math.log(448), rel=0.05)
    assert losses[-1] < 0.75 * losses[0]
    assert recorder.events[-2] == Saved(15)
    assert isinstance(recorder.events[-1], Done)
    expected = {"loss", "z_loss", "accuracy", "tokens", "tokens_per_second", "data_wait"}
    expected |= {f"{kind}/{group}" for kind in ("lr", "grad_norm") for group in ("connector", "vit", "llm")}
    expected |= {f"lr/{group}_muon" for group in ("connector", "vit", "llm")}
    assert set(recorder.logged()[0]) == expected - {"tokens_per_second", "data_wait"}, "the first step compiles and loads"
    assert set(recorder.logged()[1]) == expected


class SameBatch(RandomLoader):
    def example(self, stream, step):
        return super().example(stream, 1)


def test_gradient_accumulation_changes_nothing(run):
    whole, halves = run(steps=5), run(steps=5, device_batch_size=1)
    assert halves.values("loss") == pytest.approx(whole.values("loss"), rel=1e-4)
    for group in ("connector", "vit", "llm"):
        assert halves.values(f"grad_norm/{group}") == pytest.approx(whole.values(f"grad_norm/{group}"), rel=1e-3)


def test_loss_is_the_weighted_mean_of_the_global_batch(run, tmp_path):
    """Against the formula, from logits."""
    recorder = run(steps=1, z_loss=0.0)
    config = tiny_config(tmp_path)
    model = build(config, torch.device("cpu"), Mesh())
    batch = next(iter(RandomLoader(config.data, config.model, 4, 64, config.seed, 0, 1)))
    log_probabilities = model(**batch).logits.double().log_softmax(-1)
    weights = batch["loss_masks"].clamp(min=0).double()
    chosen = log_probabilities.gather(-1, batch["labels"].clamp(0, 447)[..., None])[..., 0]
    assert recorder.values("loss")[0] == pytest.approx(-((weights * chosen).sum() / weights.sum()).item(), rel=1e-5)


@pytest.mark.parametrize("changes", [{"activation_checkpointing": "full"}, {"activation_checkpointing": "selective"}, {"log_interval": 3}])
def test_settings_that_must_not_change_the_result(run, changes):
    plain, other = run(steps=3), run(steps=3, **changes)
    assert sum(other.values("loss")) / len(other.values("loss")) == pytest.approx(sum(plain.values("loss")) / 3, rel=0.01)
    assert other.values("grad_norm/llm")[-1] == pytest.approx(plain.values("grad_norm/llm")[-1], rel=1e-4)


@pytest.mark.parametrize("precision", ["amp_bf16", "bf16"])
def test_bfloat16_stays_near(run, precision):
    plain, other = run(steps=3), run(steps=3, precision=precision)
    assert other.values("loss") == pytest.approx(plain.values("loss"), rel=0.02)
    dtypes = {p.dtype for p in other.model.parameters()}
    assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float32}


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16", "bf16"])
def test_losses_in_float8_follow_the_others(run, precision):
    exact, found = (run(precision=precision, float8=float8, steps=60).values("loss") for float8 in (False, True))
    assert found != exact
    assert sum(found[-5:]) < 0.95 * sum(found[:5]), "it learns"
    assert found == pytest.approx(exact, rel=0.02)


def test_float8_refuses_sizes_that_have_no_products(run):
    with pytest.raises(ConfigError, match=r"float8: transformer.blocks.0.ff_out is \[32, 24\]: products need multiples of 16"):
        run(float8=True, model=tiny_model(mlp_hidden_size=48))


def test_a_loss_that_is_not_finite_stops_before_the_step(run):
    poisoned = functools.partial(RandomLoader, poison_at=4)
    message = r"step 4: loss nan, gradient norm connector nan.*not taken; there is no checkpoint yet\. .*random\[0.4\], random\[1.4"
    with pytest.raises(NonFiniteError, match=message):
        run(loader=poisoned)
    with pytest.raises(NonFiniteError, match=r"not taken; the last checkpoint is step_000003\. "):
        run(loader=poisoned, checkpoint=CheckpointConfig(interval=3))


def test_a_batch_without_answers_is_an_error(run):
    with pytest.raises(ConfigError, match=r"step 1: no token of the global batch has a loss weight. Its examples: random"):
        run(loader=Unweighted)


class Unweighted(RandomLoader):
    def example(self, stream, step):
        example = super().example(stream, step)
        return example | {"loss_masks": example["loss_masks"] * 0}


def test_dropout_of_a_step_depends_on_the_seed_only(run):
    noisy = {"steps": 3, "model": tiny_config("-").model}
    noisy["model"].llm.residual_dropout = 0.3
    assert run(**noisy).values("loss") == run(**noisy).values("loss")
    assert run(**noisy).values("loss") != run(**noisy, seed=7).values("loss")


def test_stop_saves_and_ends(run, monkeypatch):
    monkeypatch.setattr(Recorder, "stop_requested", True)
    recorder = run(steps=6)
    assert recorder.only(Started, Saved, Stopped, Done) == [Started(0), Saved(1), Stopped(1)]


def test_looking_at_the_model_does_not_change_its_training(run, tmp_path):
    plain, looked = run(steps=6), run(steps=6, **looks(tmp_path / "looks"))
    assert looked.values("loss") == plain.values("loss")
    validated = looked.values("validation/loss")
    assert len(validated) == 2
    assert validated[1] < validated[0]
    samples = looked.only(Samples)
    assert [event.step for event in samples] == [3, 6]
    questions = samples[0].results
    assert [question["type"] for question in questions] == ["colour", "yes_no", "colour"]
    assert {"question", "answers", "prediction", "score"} <= set(questions[0])


def test_validation_without_anything_to_score_is_an_error(run, tmp_path):
    class Silent(RandomLoader):
        def __init__(self, data, *rest, **settings):
            super().__init__(data, *rest, **settings)
            self.silent = "other" in data.datasets

        def example(self, stream, step):
            example = super().example(stream, step)
            return example | {"loss_masks": 0 * example["loss_masks"]} if self.silent else example

    settings = looks(tmp_path / "looks")
    with pytest.raises(ConfigError, match=r"validation.data: no token of the batches that validate has a loss weight"):
        run(steps=3, loader=Silent, validation=settings["validation"])


def test_records_that_cannot_be_sampled_are_named(run, tmp_path):
    settings = looks(tmp_path / "looks")
    (tmp_path / "looks" / "red.png").unlink()
    with pytest.raises(ConfigError, match=r"records.jsonl: record 0: media: missing file"):
        run(steps=1, **settings)


def test_an_image_that_does_not_come_costs_a_line(run, tmp_path, monkeypatch):
    monkeypatch.setattr(media, "ATTEMPTS", 1)
    settings = looks(tmp_path / "looks")
    file = tmp_path / "looks" / "records.jsonl"
    first, *rest = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(record) + "\n" for record in [{**first, "image": "http://127.0.0.1:9/red.png"}, *rest]))
    recorder = run(steps=3, **settings)
    assert [note.text for note in recorder.only(Note) if "record 0: media: unreadable URL" in note.text]
    assert [result["record"] for result in recorder.only(Samples)[0].results] == [1, 2]


def test_tokens_are_counted_once_whenever_a_run_is_stopped(run, monkeypatch):
    """The checkpoint of step 4 lies between two logs."""
    settings = {"log_interval": 3, "checkpoint": CheckpointConfig(interval=4)}
    whole = run(steps=6, **settings)
    with pytest.raises(RuntimeError, match="end of step 5"):
        run(steps=6, name="broken", loader=functools.partial(Breaking, step=5), **settings)
    continued = run(steps=6, name="broken", **settings)
    assert continued.only(Started) == [Started(4)]
    assert continued.values("tokens") == [whole.values("tokens")[-1]]


class Breaking(RandomLoader):
    def __init__(self, *arguments, step, **settings):
        super().__init__(*arguments, **settings)
        self.step = step

    def __iter__(self):
        for number, batch in enumerate(super().__iter__(), 1):
            yield batch
            if number == self.step:
                raise RuntimeError(f"end of step {number}")


def test_rates_are_those_of_the_steps_alone(run, monkeypatch, tmp_path):
    """By a clock that only this test moves: validation and sampling take 1,000 s, the first batch 100 s, every other one 0.25 s."""
    monkeypatch.setattr(meter, "time", SimpleNamespace(perf_counter=lambda: Clock.now))
    for name in ("Validator", "Sampler"):
        look = getattr(loop, name).run
        monkeypatch.setattr(getattr(loop, name), "run", lambda self, look=look: (Clock.forward(1000), look(self))[1])
    settings = looks(tmp_path / "looks")
    settings["validation"].interval = settings["samples"].interval = 1
    recorder = run(steps=3, log_interval=1, loader=Clock, **settings)
    first, second, third = recorder.values("tokens")
    assert recorder.values("tokens_per_second") == pytest.approx([(second - first) / 0.25, (third - second) / 0.25])
    assert recorder.values("data_wait") == pytest.approx([1.0, 1.0])


class Clock(RandomLoader):
    """A loader whose batches take time."""

    now = 0.0

    @classmethod
    def forward(cls, seconds):
        cls.now += seconds

    def __iter__(self):
        seconds = 100.0
        for batch in super().__iter__():
            self.forward(seconds)
            yield batch
            seconds = 0.25


@pytest.mark.parametrize("steps", [3, 2])
def test_a_run_that_is_given_fewer_steps_leaves_its_model(run, monkeypatch, steps):
    """Stopped after 3 of 6 steps and started again with so few steps that nothing is left to train."""
    with pytest.raises(RuntimeError):
        run(steps=6, name="cut", loader=functools.partial(Breaking, step=4), checkpoint=CheckpointConfig(interval=3))
    (done,) = run(steps=steps, name="cut").only(Done)
    assert done.step == 3
    assert done.model.endswith("/cut/step_000003/model")
    trained = run(steps=3)
    expected, found = trained.model.state_dict(), load_model(done.model).state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert run(steps=steps, name="cut").only(Done, Saved) == [done], "a third time: nothing to do"
