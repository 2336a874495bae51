"""Models of the family take three steps through Ray Train, each from its own records: images, texts, clips, points; also streamed ones.

MolmoE and VideoOlmo are left to the tests of FSDP and of the recipes, for the sake of the suite's time.
"""

import functools
import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from batches import GOLDEN, tiny_config
from PIL import Image

from molmo_core.checkpoint import load_model
from molmo_core.models.base import BaseModelConfig
from molmo_core.models.molmo2 import Molmo2Config
from pipelines import cluster
from pipelines.data.batches.loader import TrainLoader
from pipelines.data.config import DataConfig
from pipelines.training.config import ValidationConfig
from pipelines.training.trainer import run_training

pytestmark = pytest.mark.slow

SMALL = ["llm.n_layers=1", "llm.d_model=32", "llm.mlp_hidden_size=64"]


def of_golden(name, *overrides):
    return BaseModelConfig.load(GOLDEN / name / "config.yaml", [*SMALL, *overrides])


def molmo2():
    he = of_golden("he-molmo").as_dict()
    settings = {"overlap_margins": (1, 1), "max_crops": 4, "max_frames": 4}
    return Molmo2Config.new(llm=he["llm"], vision_backbone=he["vision_backbone"], mm_preprocessor=settings)


MODELS = {
    "molmo": lambda: of_golden("molmo-qwen2-clip"),
    "he_molmo": lambda: of_golden("he-molmo", "llm.n_layers=2"),
    "molmo2": molmo2,
    "molmo_point": lambda: of_golden("molmo-point/a", "data_formatter.debug=false"),
}
RECORDS = {"molmo2": "both.jsonl", "molmo_point": "points.jsonl"}


@pytest.fixture(scope="module")
def storage(empty_database, tmp_path_factory):
    """A cluster for all runs, and the records of a global batch: a text, images, clips for those that take them."""
    folder = tmp_path_factory.mktemp("family")
    shutil.copy(empty_database, folder)
    for i in range(3):
        pixels = np.random.RandomState(i).randint(0, 256, (60, 60 + 30 * i, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    text = {"messages": ["What is the capital of France?", "Paris."]}
    images = [{"image": f"{i}.png", "messages": ["How many dogs?", f"There are {i}."]} for i in range(3)]
    clip = {"video": str(GOLDEN / "video-olmo" / "video.mp4"), "messages": ["What happens?", "A ball rolls."]}
    clips = [text, clip, {**clip, "messages": ["Is it red?", "No."]}]
    points = [{"image": f"{i}.png", "label": "dogs", "points": [[10, 10], [40, 50]]} for i in range(2)]
    both = {"images": ["0.png", "1.png"], "label": "dogs", "question": "Where?", "image_points": [[[20, 10]], []]}
    named = {"images": [text, *images], "both": [*clips, images[1]], "points": [text, *points, both]}
    for name, rows in named.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    env = {"PYTHONPATH": str(Path(__file__).parent)}  # workers find this file
    with pytest.MonkeyPatch.context() as patch, cluster.connect(num_cpus=3, object_store_memory=256 << 20, env=env):
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        yield folder


def config_of(storage, model, **changes):
    """The same four records in every step, so that the loss has to fall."""
    records = str(storage / RECORDS.get(model, "images.jsonl"))
    data = DataConfig.from_dict({"datasets": {"x": {"path": records}}, "shuffle": False, "actors": 1})
    return tiny_config(storage, model=MODELS[model](), data=data, sequence_length=512, **({"steps": 3, "num_workers": 2} | changes))


class Direct(TrainLoader):
    """The same batches, made in the worker itself."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.streamed = False


def losses(result):
    return [values["loss"] for _, values in result.metrics if "loss" in values]


@pytest.fixture(scope="module")
def run(storage):
    """Trains a model of the family, once."""
    return functools.cache(lambda model: run_training(config_of(storage, model, name=model), Direct))


@pytest.mark.parametrize("model", MODELS)
def test_three_steps(storage, run, model):
    config, result = config_of(storage, model), run(model)
    found = losses(result)
    assert result.stopped_by is None, "a signal ended the run: no fault of the model"
    assert (result.step, result.finished, len(found)) == (3, True, 3)
    assert all(map(math.isfinite, found))
    assert found[2] < found[0]
    (batch,) = itertools.islice(Direct(config.data, config.model, 4, 512, config.seed, 0, 1), 1)
    assert batch["input_ids"].shape[0] == 4
    assert (batch["loss_masks"].sum(1) > 0).all(), "every record is used"
    trained = load_model(result.checkpoint)
    assert trained(**batch).metrics["cross_entropy"] < found[0]
    for name in trained.further_losses:
        further = [values[f"{name}_loss"] for _, values in result.metrics if f"{name}_loss" in values]
        assert len(further) == 3
        assert further[2] < further[0]


def test_streamed_records_while_validation_is_streamed_too(storage, run):
    """Decode actors of two pipelines beside a worker: the same numbers as without them on two."""
    validation = ValidationConfig(data=config_of(storage, "molmo").data, interval=1, batches=1)
    config = config_of(storage, "molmo", name="streamed", validation=validation, steps=2, num_workers=1)
    streamed = run_training(config)
    assert losses(streamed) == pytest.approx(losses(run("molmo"))[:2], rel=1e-4)
    assert len([values for _, values in streamed.metrics if "validation/loss" in values]) == 2
