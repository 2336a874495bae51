"""The recipes of MolmoPoint take a step: their mixtures, settings of the model and rates, on a tiny model and a few records."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from molmo_core.model_configs.molmo_point import MolmoPointConfig
from pipelines.data.batches.loader import TrainLoader
from pipelines.training.build import build
from pipelines.training.config import TrainConfig
from pipelines.training.mesh import Mesh
from pipelines.training.meter import Meter
from pipelines.training.optim import Optimizer

CONFIGS = Path(__file__).parents[3] / "configs/train"
RECIPES = {"pretrain": [], "sft": ["init_from=c"], "long": ["init_from=c"], "gui": ["init_from=c"]}
KINDS = {"tracking": "tracks", "video_pointing": "clips", "text": "text", "hardcodes": "text", "captions": "captions"}


@pytest.fixture(scope="module")
def home(golden, tmp_path_factory):
    """A tiny model's configuration, and records of every kind."""
    folder = tmp_path_factory.mktemp("recipes")
    config = MolmoPointConfig.load(golden / "molmo-point" / "a" / "config.yaml", ["data_formatter.debug=false"])
    config.save(folder / "model.yaml")
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (60, 80, 3), np.uint8)).save(folder / "a.png")
    clip = {"video": str(golden / "video-olmo" / "video.mp4"), "label": "ball", "timestamps": [0.0, 1.0], "point_scale": 100}
    records = {
        "text": {"messages": ["Hello?", "Yes."]},
        "captions": {
            "image": "a.png",
            "message_list": [{"style": "long_caption", "text": "Noise."}, {"style": "transcript", "text": "Noise"}],
        },
        "images": {"image": "a.png", "label": "dogs", "points": [[8, 6], [70, 55]]},
        "clips": {**clip, "style": "video_point", "points": [[[10, 90]], [[60, 40]]]},
        "tracks": {**clip, "style": "video_point_track_per_frame", "tracks": [{"a": [10, 90]}, {"a": [60, 40]}]},
    }
    for name, record in records.items():
        (folder / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    return folder


def load(home, name, *changes):
    """A recipe with the tiny model and its records; everything that it says of the model is applied to that."""
    plain = TrainConfig.load(CONFIGS / f"molmo-point-{name}.yaml", [*RECIPES[name], f"model.base={home / 'model.yaml'}"])
    paths = []
    for group, settings in plain.data.all_groups().items():
        prefix = f"data.groups.{group}" if plain.data.groups else "data"
        paths += [f"{prefix}.datasets.{dataset}.path={home / KINDS.get(group, 'images')}.jsonl" for dataset in settings.datasets]
    small = ["init_from=null", "model.llm.init_path=null", "model.vision_backbone.vit.init_path=null", "precision=fp32"]
    small += ["data.packing=null", "global_batch_size=8", "device_batch_size=null", "num_workers=1", "sequence_length=600"]
    return TrainConfig.load(
        CONFIGS / f"molmo-point-{name}.yaml", [*RECIPES[name], f"model.base={home / 'model.yaml'}", *paths, *small, *changes]
    )


@pytest.mark.parametrize("name", RECIPES)
def test_a_step(home, name):
    config = load(home, name)
    loader = TrainLoader(config.data, config.model, 8, 600, config.seed, 0, 1)
    collate = config.model.build_collator(None, None, include_metadata=False)
    batch = collate(loader.examples(8))
    assert (batch["point_target_ids"] >= 0).any()
    model = build(config, torch.device("cpu"), Mesh())
    optimizer = Optimizer(model, config.optim)
    before = {group: [p.detach().clone() for p in parameters] for group, parameters in optimizer.parameters.items()}
    output = model(**batch, z_loss_weight=config.z_loss)
    meter = Meter(model, torch.device("cpu"))
    for _ in range(2):
        meter.begin()
        meter.has_batch()
        meter.add(output)
        meter.end(meter.step_sums(), torch.tensor(False), 1, 1)
    told = meter.means()
    for head in ("patch", "subpatch", "location"):
        for kind in ("loss", "acc"):
            assert told[f"{head}_{kind}"] == pytest.approx(output.metrics[f"{head}_{kind}"].item(), rel=1e-5)
    assert output.metrics["patch_count"] == (batch["point_target_ids"][..., 0] >= 0).sum()
    output.loss.backward()
    rates = optimizer.set_learning_rates(200, config.steps)
    optimizer.step(torch.tensor(False))
    assert rates["lr/pointing"] == pytest.approx(1e-4, rel=1e-3)
    assert rates["lr/connector"] == pytest.approx(2e-4 if name == "pretrain" else 5e-6, rel=1e-3)
    assert before.keys() == {"connector", "vit", "llm", "pointing"}
    for group, parameters in before.items():
        assert any(not torch.equal(old, new) for old, new in zip(parameters, optimizer.parameters[group])), group


def test_what_a_recipe_says_of_its_model(home):
    pretrain, sft, long, gui = (load(home, name).model for name in RECIPES)
    assert (pretrain.llm.response_residual_dropout, sft.llm.response_residual_dropout, sft.llm.residual_dropout) == (0.1, 0.0, 0.1)
    assert (pretrain.mm_preprocessor.max_frames, sft.mm_preprocessor.max_frames, long.mm_preprocessor.max_frames) == (16, 128, 384)
    assert gui.mm_preprocessor.max_crops == 48
    assert pretrain.data_formatter.system_prompt == "style_and_length_v2"
    # On the command line it can be changed again.
    assert load(home, "gui", "model.mm_preprocessor.max_crops=3").model.mm_preprocessor.max_crops == 3


def test_shares_of_the_mixture(home):
    config = load(home, "sft")
    loader = TrainLoader(config.data, config.model, 8, 600, config.seed, 0, 1)
    drawn = dict(zip(loader.datasets, loader.plan.rates))
    tracking = config.data.groups["tracking"].datasets
    assert sum(drawn[name] for name in tracking) == pytest.approx(0.12)
    assert drawn["track"] / drawn["ground"] == pytest.approx(0.45 / 0.2)
    assert sum(drawn.values()) == pytest.approx(1.0)
