"""Writes a checkpoint for other tools (transformers, vLLM) and checks the result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from jobs.command import job


def main(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Checkpoint folder (own or published), hub repository, or models:/name@alias.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must not exist yet.")],
    format: Annotated[
        Literal["huggingface", "native"], typer.Option(help="huggingface: the published layout; native: this project's own.")
    ] = "huggingface",
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None, typer.Option(help="Floating-point type to store (default: as it is).")
    ] = None,
) -> None:
    """Exports a checkpoint, reads it back and compares its answers with the original's."""
    import torch

    from molmo_core.checkpoint.export import export_and_verify
    from pipelines.model_folder import model_folder

    export_and_verify(model_folder(checkpoint), out, format, getattr(torch, dtype) if dtype else None)


app = job(main)

if __name__ == "__main__":
    app()
