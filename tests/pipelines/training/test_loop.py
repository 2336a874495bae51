"""The loop in one process, without Ray: what a step computes, what is logged, when it stops."""

import functools
import math

import pytest
import ray.train
import ray.train.torch
import torch
from batches import RandomLoader, looks, tiny_config

from molmo_core.config import ConfigError
from pipelines.training import checkpointing, loop


class Recorder:
    """Stands in for the Reporter."""

    stop_requested = False

    def __init__(self):
        self.events = []

    def send(self, kind, step, content=None):
        self.events.append((kind, step, content))

    def heartbeat(self, step):
        pass

    def values(self, name):
        return [content[name] for kind, _, content in self.events if kind == "metrics" and name in content]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Trains in this process; nothing is saved."""
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: None)
    models = []
    monkeypatch.setattr(checkpointing, "save", lambda model, *_, **__: models.append(model))

    def train(loader=RandomLoader, **changes):
        recorder = Recorder()
        recorder.model = models
        loop.train(tiny_config(tmp_path, **changes), loader, recorder)
        return recorder

    return train


def test_loss_falls_and_everything_is_logged(run):
    recorder = run(steps=15, loader=SameBatch)
    losses = recorder.values("loss")
    assert len(losses) == 15
    assert losses[0] == pytest.approx(math.log(448), rel=0.05)
    assert losses[-1] < 0.75 * losses[0]
    kinds = [kind for kind, *_ in recorder.events]
    assert kinds[-2:] == ["checkpoint", "done"]
    expected = {"loss", "z_loss", "accuracy", "tokens", "tokens_per_second", "data_wait"}
    expected |= {f"{kind}/{group}" for kind in ("lr", "grad_norm") for group in ("connector", "vit", "llm")}
    expected |= {f"lr/{group}_muon" for group in ("connector", "vit", "llm")}
    assert set(recorder.events[0][2]) == expected


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
    torch.manual_seed(config.seed)
    model = config.model.build_model()
    batch = next(iter(RandomLoader(config.data, config.model, 4, 64, config.seed, 0, 1)))
    log_probabilities = model(**batch).logits.double().log_softmax(-1)
    weights = batch["loss_masks"].clamp(min=0).double()
    chosen = log_probabilities.gather(-1, batch["labels"].clamp(0, 447)[..., None])[..., 0]
    assert recorder.values("loss")[0] == pytest.approx(-((weights * chosen).sum() / weights.sum()).item(), rel=1e-5)


@pytest.mark.parametrize("changes", [{"activation_checkpointing": True}, {"log_interval": 3}])
def test_settings_that_must_not_change_the_result(run, changes):
    plain, other = run(steps=3), run(steps=3, **changes)
    assert sum(other.values("loss")) / len(other.values("loss")) == pytest.approx(sum(plain.values("loss")) / 3, rel=0.01)
    assert other.values("grad_norm/llm")[-1] == pytest.approx(plain.values("grad_norm/llm")[-1], rel=1e-4)


@pytest.mark.parametrize("precision", ["amp_bf16", "bf16"])
def test_bfloat16_stays_near(run, precision):
    plain, other = run(steps=3), run(steps=3, precision=precision)
    assert other.values("loss") == pytest.approx(plain.values("loss"), rel=0.02)
    dtypes = {p.dtype for p in other.model[-1].parameters()}
    assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float32}


def test_a_loss_that_is_not_finite_stops_before_the_step(run):
    with pytest.raises(loop.NonFiniteError, match=r"step 4: loss nan, gradient norm connector nan.*data streams \{0: \[4\]"):
        run(loader=functools.partial(RandomLoader, poison_at=4))


def test_a_batch_without_answers_is_an_error(run):
    with pytest.raises(ConfigError, match=r"step 1: no token of the global batch has a loss weight. Rank 0, data streams"):
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
    assert [(kind, step) for kind, step, _ in recorder.events] == [("metrics", 1), ("checkpoint", 1), ("stopped", 1)]


def test_looking_at_the_model_does_not_change_its_training(run, tmp_path):
    plain, looked = run(steps=6), run(steps=6, **looks(tmp_path / "looks"))
    assert looked.values("loss") == plain.values("loss")
    validated = looked.values("validation/loss")
    assert len(validated) == 2
    assert validated[1] < validated[0]
    samples = [(step, content) for kind, step, content in looked.events if kind == "samples"]
    assert [step for step, _ in samples] == [3, 6]
    questions = [result["questions"][0] for result in samples[0][1]]
    assert [question["type"] for question in questions] == ["colour", "yes_no", "colour"]
    assert {"question", "answers", "prediction", "score"} <= set(questions[0])


def test_records_that_cannot_be_sampled_are_named(run, tmp_path):
    settings = looks(tmp_path / "looks")
    (tmp_path / "looks" / "red.png").unlink()
    with pytest.raises(ConfigError, match=r"records.jsonl: record 0: media: missing file"):
        run(steps=1, **settings)
