"""Shared fixtures. Tests run on one thread a process, so that timings and results do not depend on the machine."""

import os
import shutil
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # as pipelines/__init__.py, which a test may import after Ray
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
# Ray gives its workers the niceness 15: beside another test, which does not, they hardly get a core.
os.environ.setdefault("RAY_worker_niceness", "0")

import pytest


@pytest.fixture(scope="session")
def golden() -> Path:
    """Inputs, tiny weights and outputs of the published implementations (tests/golden/README.md)."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def tiny_model(golden):
    """A random Molmo of the demo's kind whose blocks weigh more than the last token, so that answers differ. Its sizes are its own: the
    demo's may change, and what tests expect of these answers must not change with them."""
    import torch

    from molmo_core.models.base import BaseModelConfig

    torch.manual_seed(0)
    overrides = [f"llm.tokenizer.identifier={golden / 'tokenizer'}", "llm.vocab_size=1024", "llm.max_sequence_length=16384"]
    overrides += ["llm.n_layers=2", "llm.mlp_hidden_size=512", "llm.initializer_range=0.1"]
    path = Path(__file__).parent.parent / "configs/models/demo.yaml"
    model = BaseModelConfig.load(path, overrides).build_model().eval()
    unreadable = [token for token in range(1024) if not model.tokenizer.decode([token], truncate_at_eos=False).isprintable()]
    with torch.no_grad():
        for parameter in (*model.transformer.blocks.parameters(), *model.vision_backbone.parameters()):
            parameter.mul_(12.0 if parameter.ndim > 1 else 1.0)
        model.transformer.ff_out.weight[unreadable] = 0
    return model


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_model, tmp_path_factory) -> Path:
    """The tiny model as a checkpoint folder."""
    path = tmp_path_factory.mktemp("tiny") / "model"
    tiny_model.save_checkpoint(path)
    return path


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory) -> Path:
    """A database of MLflow without a run. To copy it takes no time; to make one takes seconds."""
    from pipelines import tracking

    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
        tracking.client()
    return path


@pytest.fixture
def own_database(empty_database, tmp_path, monkeypatch) -> Path:
    """A database of the test's own: `mlflow.db` in `tmp_path`, which MLFLOW_TRACKING_URI names."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return Path(shutil.copy(empty_database, tmp_path / "mlflow.db"))
