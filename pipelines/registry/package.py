"""What a registered version carries beside its checkpoint: MLflow's files (signature, input example, requirements, code), the report of
its evaluation and of its data, and a model card."""

from __future__ import annotations

import base64
import importlib.metadata
import io
import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.models import Model, ModelSignature
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.types.schema import AnyType, ColSpec, DataType, ParamSchema, ParamSpec, Schema
from PIL import Image, ImageDraw

from molmo_core.config import ConfigError
from pipelines import tracking
from pipelines.registry.card import card
from pipelines.registry.pyfunc import ANSWER, IMAGE, MAX_TOKENS, PROMPT

EVALUATION, DATA, CARD = "evaluation", "data_report", "README.md"
REPORT = "report.json"
PACKAGES = (
    "torch", "numpy", "blake3", "pillow", "opencv-python-headless", "omegaconf", "pyyaml", "pydantic", "safetensors", "tokenizers",
    "llguidance", "transformers", "scipy", "rapidfuzz", "pandas", "mlflow",
)  # fmt: skip
"""What `molmo_core` and `pipelines.registry.pyfunc` import."""
_CODE = Path(__file__).resolve().parents[2]


def package(folder: Path, name: str, checkpoint: Path, run_id: str | None, evaluation: Path | None, data: Path | None) -> str | None:
    """Makes the files of a version in an empty folder.

    Args:
        folder: where; what is in it goes beside the checkpoint.
        name: of the registered model.
        checkpoint: what is registered.
        run_id: the run that trained it.
        evaluation: the output of `jobs.evaluate` for this checkpoint.
        data: the output of `jobs.prepare` that it was trained on.

    Returns:
        its evaluation in a line; None without one.
    """
    _mlflow_files(folder, checkpoint, run_id)
    figures = _report(evaluation, folder / EVALUATION, "evaluation", "jobs.evaluate") if evaluation else None
    about_data = _report(data, folder / DATA, "data", "jobs.prepare") if data else None
    pictures = sorted(path.relative_to(folder).as_posix() for path in (folder / EVALUATION).glob("*.png"))
    (folder / CARD).write_text(card(name, checkpoint, run_id, figures, about_data, pictures, requirements()), encoding="utf-8")
    return scores_line(figures) if figures else None


def requirements() -> list[str]:
    """What the version needs, as it is installed here: `torch==2.13.0`, ..."""
    # A local label (+cpu) names a build that no package index has.
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in PACKAGES]


def signature() -> ModelSignature:
    """Columns `prompt` and `image` in (a path, bytes or a data URL: MLflow has no type for that choice), `answer` out."""
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string, PROMPT), ColSpec(AnyType(), IMAGE, required=False)]),
        outputs=Schema([ColSpec(DataType.string, ANSWER)]),
        params=ParamSchema([ParamSpec("max_tokens", DataType.long, MAX_TOKENS)]),
    )


def input_example() -> pd.DataFrame:
    """A drawing and a question."""
    picture = Image.new("RGB", (96, 64), "white")
    ImageDraw.Draw(picture).ellipse((30, 14, 66, 50), fill=(200, 30, 30))
    file = io.BytesIO()
    picture.save(file, "PNG")
    address = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return pd.DataFrame({PROMPT: ["What is in this picture?"], IMAGE: [address]})


def _mlflow_files(folder: Path, checkpoint: Path, run_id: str | None) -> None:
    model = Model(run_id=run_id)
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as temporary:
        # An empty folder takes the place of the checkpoint, which is not copied: it goes to the registry from where it is.
        place = Path(temporary) / Path(tracking.CHECKPOINT).name
        place.mkdir()
        made = Path(temporary) / "model"
        mlflow.pyfunc.save_model(
            made,
            loader_module="pipelines.registry.pyfunc",
            data_path=str(place),
            code_paths=[str(_code(Path(temporary) / "code" / part)) for part in ("molmo_core", "pipelines")],
            mlflow_model=model,
            signature=signature(),
            input_example=input_example(),
            pip_requirements=requirements(),
        )
        model.model_size_bytes = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
        model.save(made / MLMODEL_FILE_NAME)
        shutil.copytree(made, folder, dirs_exist_ok=True)


def _code(target: Path) -> Path:
    """A copy of one of the project's packages, as they are now."""
    return Path(shutil.copytree(_CODE / target.name, target, ignore=shutil.ignore_patterns("__pycache__")))


def _report(source: Path, target: Path, setting: str, job: str) -> dict[str, Any]:
    """Copies the report, the pages and the pictures of a job's output; returns what report.json holds."""
    try:
        report = json.loads((source / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{setting}={source}: holds no {REPORT} of {job} ({error})") from None
    target.mkdir()
    for path in sorted(source.iterdir()):
        if path.suffix in (".png", ".html") or path.name == REPORT:
            shutil.copy(path, target)
    return report


def scores_line(figures: dict[str, Any]) -> str:
    """`Evaluation: overall 98.7%, shape 50.0%`."""
    scores = {kind: found["score"] for kind, found in figures["types"].items()}
    if figures.get("overall") is not None:
        scores = {"overall": figures["overall"], **scores}
    return "Evaluation: " + ", ".join(f"{kind} {score:.1%}" for kind, score in scores.items() if score is not None)
