"""Reaches what only the comparisons need, in a folder beside the project's environment (see requirements-peers.txt)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

PEERS = Path(__file__).resolve().parents[1] / ".venv-peers"


def torchvision() -> Any:
    """Makes torchvision importable for this process. Keep what is returned as long as it is used.

    Raises:
        SystemExit: it is not installed; the message says how.
    """
    if not PEERS.is_dir():
        raise SystemExit(
            f"{PEERS} is missing; create it with: .venv/bin/pip install --no-deps --target .venv-peers -r benchmarks/requirements-peers.txt"
        )
    sys.path.append(str(PEERS))
    import torch

    # PyPI's torchvision is built for CUDA: beside a CPU torch its operators are missing, and importing it fails without their names.
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
