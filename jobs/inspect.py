"""Show examples as the model sees them, on one page: crops, pooled tokens, loss weights, points, mask."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.command import ConfigPath, Overrides, job
from molmo_core.config import ConfigError, read_yaml
from pipelines.data.config import PrepareConfig
from pipelines.training.config import TrainConfig


def main(
    config: ConfigPath,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("inspect.html"),
    count: Annotated[int, typer.Option(help="Rows to show.", min=1)] = 8,
) -> None:
    """Show examples as the model sees them, on one page. CONFIG is a training configuration (packs as they are trained on), or that of
    a preparation (its records, or what it prepared)."""
    settings = TrainConfig.load(config, overrides) if "data" in read_yaml(config) else PrepareConfig.load(config, overrides)
    from molmo_core.preprocessing.tiling import ImageSettings
    from pipelines.data.batches.loader import TrainLoader
    from pipelines.data.inspection import Inspector
    from pipelines.data.inspection_rows import attention_mask, preparation_rows

    model: Any
    left_out: list[str] = []
    if isinstance(settings, TrainConfig):
        run = settings
        loader = TrainLoader(run.data, run.model, run.global_batch_size, run.sequence_length, run.seed, 0, 1)
        model, rows = run.model, loader.examples(count)
    else:
        model, rows, left_out = preparation_rows(settings, count)
    for line in left_out:
        print(f"left out {line}")
    if not rows:
        raise ConfigError(f"{config}: none of the first records is usable")
    images = model.build_preprocessor(for_inference=False).settings or ImageSettings()  # of a text model: never looked at
    inspector = Inspector(model.build_tokenizer(), images, lambda *arrays: attention_mask(model, *arrays))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(inspector.page(rows, f"{config}: {len(rows)} rows"), encoding="utf-8")
    print(f"{out}: {len(rows)} rows, {out.stat().st_size / 1e6:.1f} MB")


app = job(main)

if __name__ == "__main__":
    app()
