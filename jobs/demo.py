"""The main job end to end on a laptop: prepare, train, evaluate, register, serve and ask, on real data.

Everything it writes is in `runs/` of the current folder; `runs/demo` is made anew every time. Changes are given by stage, for example
`train.seed=7`, `train.steps=300`, `prepare.limit=200`, `evaluate.limit=100`.
"""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.command import job


def main(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="STAGE.KEY=VALUE", help="Changes, e.g. train.seed=7.", show_default=False)
    ] = None,
) -> None:
    """Prepares data, trains a tiny Molmo on it, evaluates, registers and serves it, and asks it over HTTP; about five minutes.

    Everything it writes is in `runs/` of the current folder; `runs/demo` is made anew every time. `molmo JOB --help` lists the settings of
    a stage.
    """
    from pipelines import demo

    summary = demo.demo(overrides)
    demo.stage("Summary", "")
    demo.console.print(demo.closing_words(summary), highlight=False, soft_wrap=True)


app = job(main)

if __name__ == "__main__":
    app()
