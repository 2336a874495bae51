"""Where a run's results come from: the code, the versions of what it stands on, the machine, the data."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from pipelines.data.batches.prepared import reads_prepared
from pipelines.data.config import DataConfig
from pipelines.data.preparation.books import REPORT

PACKAGES = ("molmo-pipelines", "torch", "ray", "mlflow", "numpy", "pyarrow", "transformers", "tokenizers", "pillow", "av", "decord")
ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, Any]:
    """Of this process: versions of packages (None: not installed), Python, machine, GPUs."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"python": platform.python_version(), "machine": platform.platform(), "gpus": gpus, "packages": versions}


def git_revision(folder: Path = ROOT) -> str | None:
    """The commit of the code, with `-dirty` if files differ from it; None where there is no repository (a submitted job, a package)."""
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def data_reports(data: DataConfig) -> dict[str, Path]:
    """The reports that `jobs.prepare` wrote beside the prepared datasets of a run, by the name of the dataset."""
    datasets = {name: config for group in data.all_groups().values() for name, config in group.datasets.items()}
    found = {name: Path(config.path) / REPORT for name, config in datasets.items() if reads_prepared(config)}
    return {name: path for name, path in found.items() if path.is_file()}
