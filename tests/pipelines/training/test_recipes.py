"""Every recipe fits the GPUs that it names, and takes a step: its mixture, settings and rates, on a tiny model and a few records."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import GOLDEN
from PIL import Image

from molmo_core.model_configs.molmo2 import Molmo2Config
from molmo_core.registry import BaseModelConfig
from pipelines.data.batches.loader import TrainLoader
from pipelines.training.build import build
from pipelines.training.config import TrainConfig
from pipelines.training.mesh import Mesh
from pipelines.training.meter import Meter
from pipelines.training.optim import Optimizer
from pipelines.training.plan import USABLE, plan
from pipelines.training.step import TrainStep, loss_weight

CONFIGS = Path(__file__).parents[3] / "configs"
SMALL_TEXT = ["model.llm.init_path=null", "model.llm.n_layers=1", "model.llm.embedding_size=1024"]
TINY = {"demo": [], "demo-point": [], "video-small": [], "emoji_scenes": SMALL_TEXT, "emoji_scenes_small": []}
"""Recipes of demos: their models are tiny as they are, or nearly."""
# What else a recipe is for: the tiny model and the published one in whose place it stands, and the length if that is left to the user.
PUBLISHED = {
    "finetune": ("molmo", "molmo-7b-d", []),
    "molmo-captioner": ("molmo", "molmo-7b-d", ["steps=8000"]),
    "molmo-sft": ("molmo", "molmo-7b-d", []),
    "molmo2-pretrain": ("molmo2", "molmo2-8b", []),
    "molmo2-sft": ("molmo2", "molmo2-8b", ["steps=22000"]),
    "molmo2-long": ("molmo2", "molmo2-8b", []),
    "he-molmo-captioner": ("he", "he-molmo", ["steps=8000"]),
    "he-molmo-qa": ("he", "he-molmo", []),
    "molmo-point-pretrain": ("point", "molmo-point-8b", []),
    "molmo-point-sft": ("point", "molmo-point-8b", []),
    "molmo-point-long": ("point", "molmo-point-8b", []),
    "molmo-point-gui": ("point", "molmo-point-8b", []),
}
POINT = [name for name in PUBLISHED if name.startswith("molmo-point-")]
RATES = {"pretrain": 2e-4, "captioner": 2e-4}
"""Of the connector at its peak, by what a recipe does; others fine-tune."""
# The records of a dataset, by its name or its group's.
KINDS = {
    "tracking": "tracks", "video_pointing": "clips", "clips": "videos", "text": "text", "hardcodes": "text", "captions": "captions",
    "pixmo_cap_with_transcripts": "captions", "transcripts": "transcripts", "image_pointing": "points", "pointing": "points",
    "molmo_point_synthetic": "points", "easy_vqa": "points",
}  # fmt: skip
SIZE = ["llm.n_layers=1", "llm.d_model=32", "llm.mlp_hidden_size=64"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The configurations of tiny models, and records of every kind."""
    folder = tmp_path_factory.mktemp("recipes")
    he = BaseModelConfig.load(GOLDEN / "he-molmo" / "config.yaml", [*SIZE, "llm.n_layers=2"])
    molmo2 = {
        "llm": he.as_dict()["llm"],
        "vision_backbone": he.as_dict()["vision_backbone"],
        "mm_preprocessor": {"overlap_margins": (1, 1)},
    }
    tiny = {
        "molmo": BaseModelConfig.load(GOLDEN / "molmo-qwen2-clip" / "config.yaml", SIZE),
        "molmo2": Molmo2Config.new(**molmo2),
        "he": he,
        "point": BaseModelConfig.load(GOLDEN / "molmo-point" / "a" / "config.yaml", ["data_formatter.debug=false"]),
    }
    for name, config in tiny.items():
        config.save(folder / f"{name}.yaml")
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (60, 80, 3), np.uint8)).save(folder / "a.png")
    clip = {"video": str(GOLDEN / "video-olmo" / "video.mp4"), "label": "ball", "timestamps": [0.0, 1.0], "point_scale": 100}
    caption, transcript = {"style": "long_caption", "text": "Noise."}, {"style": "transcript", "text": "Noise"}
    records = {
        "text": {"messages": ["Hello?", "Yes."]},
        "questions": {"image": "a.png", "question": "How many dogs?", "answer": "two"},
        "videos": {"video": clip["video"], "question": "What happens?", "answer": "A ball rolls."},
        "captions": {"image": "a.png", "message_list": [caption, transcript]},
        "transcripts": {"image": "a.png", **transcript},
        "points": {"image": "a.png", "label": "dogs", "points": [[8, 6], [70, 55]]},
        "clips": {**clip, "style": "video_point", "points": [[[10, 90]], [[60, 40]]]},
        "tracks": {**clip, "style": "video_point_track_per_frame", "tracks": [{"a": [10, 90]}, {"a": [60, 40]}]},
    }
    for name, record in records.items():
        (folder / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    return folder


def load(name, model, *changes):
    """A recipe with a model in the place of its own; what it says of its model is applied to that."""
    path = CONFIGS / "train" / f"{name}.yaml"
    given = [f"model.base={model}" if "base:" in path.read_text() else f"model={model}", "init_from=c"]
    return TrainConfig.load(path, [*given, *PUBLISHED[name][2], *changes])


def small(home, name, *changes):
    """A recipe as one CPU can run it: the tiny model, its records."""
    if name in TINY:
        tokenizer = [f"model.llm.tokenizer.identifier={GOLDEN / 'tokenizer'}", "model.llm.vocab_size=1024", *TINY[name]]
        make = functools.partial(TrainConfig.load, CONFIGS / "train" / f"{name}.yaml")
    else:
        tokenizer = [
            "model.llm.init_path=null",
            "model.vision_backbone.vit.init_path=null",
            "device_batch_size=null",
            "sequence_length=600",
        ]
        make = lambda given: load(name, home / f"{PUBLISHED[name][0]}.yaml", *given)  # noqa: E731
    paths, plain = [], make(tokenizer)
    for group, settings in plain.data.all_groups().items():
        prefix = f"data.groups.{group}" if plain.data.groups else "data"
        for dataset in settings.datasets:
            kind = KINDS.get(dataset, KINDS.get(group, "questions"))
            paths.append(f"{prefix}.datasets.{dataset}.path={home / kind}.jsonl")
    alone = ["init_from=null", "precision=fp32", "compile=false", "data.packing=null", "global_batch_size=8", "num_workers=1"]
    return make([*tokenizer, *paths, *alone, *changes])


def test_all_recipes_are_here():
    assert sorted(path.stem for path in (CONFIGS / "train").glob("*.yaml")) == sorted([*TINY, *PUBLISHED])


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "finetune"])
def test_it_fits_the_gpus_that_it_names(name):
    """80 GB each, as `jobs.plan` computes it."""
    config = load(name, CONFIGS / "models" / f"{PUBLISHED[name][1]}.yaml")
    assert config.num_workers == 8
    assert plan(config).peak < USABLE * 80e9


def test_adapters_of_a_model_of_7b_fit_one_gpu():
    model = CONFIGS / "models/molmo-7b-d.yaml"
    whole = plan(load("finetune", model, "precision=bf16"))
    adapters = plan(load("finetune", model, "precision=bf16", "lora.rank=16"))
    assert adapters.peak < 0.4 * 80e9
    assert adapters.peak < whole.peak / 2
    assert 0 < adapters.parameters - whole.parameters < 0.01 * whole.parameters


@pytest.mark.parametrize("name", [*TINY, *PUBLISHED])
def test_a_step(home, name):
    config = small(home, name)
    loader = TrainLoader(config.data, config.model, 8, config.sequence_length, config.seed, 0, 1)
    batch = config.model.build_collator(None, None, include_metadata=False)(loader.examples(8))
    device = torch.device("cpu")
    model = build(config, device, Mesh())
    optimizer = Optimizer(model, config.optim)
    before = {group: [p.detach().clone() for p in parameters] for group, parameters in optimizer.parameters.items()}
    meter = Meter(model, device)
    step = TrainStep(config, model, optimizer, meter, [])
    number = max(getattr(config.optim, group).warmup for group in before)
    weight = loss_weight(batch)
    assert weight > 0
    torch.manual_seed(0)  # dropout
    metrics = model(**batch).metrics
    meter.begin()
    meter.has_batch()
    torch.manual_seed(0)
    taken = step(number, batch, weight, {})
    meter.end(taken.sums, taken.step.left_out, 1, 1)
    told = meter.means()
    assert told["loss"] == pytest.approx(metrics["cross_entropy"].item(), rel=1e-4)
    assert before.keys() >= {"connector", "vit", "llm"}
    for group, parameters in before.items():
        assert any(not torch.equal(old, new) for old, new in zip(parameters, optimizer.parameters[group])), group
    if name in PUBLISHED:
        assert taken.rates["lr/connector"] == pytest.approx(RATES.get(name.rpartition("-")[2], 5e-6), rel=0.2)
    if name in POINT:
        assert (batch["point_target_ids"] >= 0).any()
        assert taken.rates["lr/pointing"] == pytest.approx(1e-4, rel=0.2)
        for figure in (f"{head}_{kind}" for head in ("patch", "subpatch", "location") for kind in ("loss", "acc")):
            assert told[figure] == pytest.approx(metrics[figure].item(), rel=1e-4)
        assert metrics["patch_count"] == (batch["point_target_ids"][..., 0] >= 0).sum()


def test_what_a_recipe_says_of_its_model(home):
    pretrain, sft, long, gui = (small(home, name).model for name in POINT)
    assert (pretrain.llm.response_residual_dropout, sft.llm.response_residual_dropout, sft.llm.residual_dropout) == (0.1, 0.0, 0.1)
    assert (pretrain.mm_preprocessor.max_frames, sft.mm_preprocessor.max_frames, long.mm_preprocessor.max_frames) == (16, 128, 384)
    assert gui.mm_preprocessor.max_crops == 48
    assert pretrain.data_formatter.system_prompt == "style_and_length_v2"
    # On the command line it can be changed again.
    assert small(home, "molmo-point-gui", "model.mm_preprocessor.max_crops=3").model.mm_preprocessor.max_crops == 3


@pytest.mark.parametrize(
    ("name", "tracking", "shares"),
    [("molmo-point-sft", 0.12, (0.45, 0.2)), ("molmo2-sft", 0.15 / 1.1, (0.4, 0.2))],
)
def test_shares_of_the_mixture(home, name, tracking, shares):
    config = small(home, name)
    loader = TrainLoader(config.data, config.model, 8, 600, config.seed, 0, 1)
    drawn = dict(zip(loader.datasets, loader.plan.rates))
    assert sum(drawn[dataset] for dataset in config.data.groups["tracking"].datasets) == pytest.approx(tracking)
    assert drawn["track"] / drawn["ground"] == pytest.approx(shares[0] / shares[1])
    assert sum(drawn.values()) == pytest.approx(1.0)
