"""The main job end to end on a laptop: prepare, train, evaluate, register, serve and ask, on real data.

A demo is a file in `configs/demo`, which names one configuration file a stage. Everything it writes is in `runs/` of the current folder.
Changes are given by stage, for example `train.seed=7`, `train.steps=300`, `prepare.limit=200`, `evaluate.limit=100`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.command import job
from pipelines.demo_config import DemoConfig

DEMO = Path(__file__).resolve().parent.parent / "configs/demo/easy_vqa.yaml"


def main(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] STAGE.KEY=VALUE", help="Another demo than easy_vqa.yaml; changes, e.g. train.seed=7.", show_default=False
        ),
    ] = None,
) -> None:
    """Prepares data, trains a tiny Molmo on it, evaluates, registers and serves it, and asks it over HTTP; about five minutes.

    Everything it writes is in `runs/` of the current folder; `runs/demo` is made anew every time. `molmo JOB --help` lists the settings of
    a stage.
    """
    overrides = list(arguments or ())
    config = DemoConfig.load(overrides.pop(0) if overrides and "=" not in overrides[0] else DEMO)
    from pipelines import demo

    summary = demo.demo(config, overrides)
    demo.stage("Summary", "")
    demo.console.print(demo.closing_words(config, summary), highlight=False, soft_wrap=True)


app = job(main, DemoConfig)

if __name__ == "__main__":
    app()
