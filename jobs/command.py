"""What every job's command line shares: the CONFIG and key=value arguments, and errors a person can act on.

A job is a function and three lines around it:

    from jobs.command import ConfigPath, Overrides, job

    def main(config: ConfigPath, overrides: Overrides = None) -> None:
        \"\"\"What the job does (the first line is its help).\"\"\"
        prepare(PrepareConfig.load(config, overrides))

    app = job(main, PrepareConfig)

    if __name__ == "__main__":
        app()

The configuration class is there for `--help`, which lists its settings. A job's module imports no Ray, torch or MLflow at its top:
help and mistakes are shown at once.

`python -m jobs.prepare CONFIG [key=value ...]` and `molmo prepare CONFIG [key=value ...]` both run `app`. Other arguments and
options (`out: Annotated[Path, typer.Option(help=...)]`) are typer's. The module's docstring gives the verb's line in `molmo --help`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from molmo_core.config import BaseConfig, ConfigError, MissingFile
from pipelines.training.errors import TrainingError

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of this job's configuration.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the configuration, e.g. limit=100 or optim.llm.lr=1e-5.", show_default=False),
]

OptionalConfig = Annotated[
    str | None, typer.Argument(metavar="[CONFIG]", help="YAML file of this job's configuration, if there is one.", show_default=False)
]
"""For a job whose settings may all be KEY=VALUE; see `file_and_changes`."""

EXIT_CODES: dict[type[Exception], int] = {ConfigError: 2, TrainingError: 1}
"""Errors whose text says what a person can do: they are printed without a traceback and end with this code."""


def job(main: Callable[..., Any], config: type[BaseConfig] | None = None) -> typer.Typer:
    """The command-line program of a job: `main`'s arguments become the command's, its docstring the help.

    `config` is what CONFIG holds; `--help` lists its settings.
    The errors in `EXIT_CODES` (also raised inside a Ray worker) are printed without a traceback;
    Ctrl-C ends with 130. Any other error keeps its traceback.
    """

    @functools.wraps(main)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            main(*args, **kwargs)
        except tuple(EXIT_CODES) as error:
            # Ray re-raises a worker's error as a subclass that carries the remote traceback; `cause` is the error itself.
            told = getattr(error, "cause", None) or error
            print(f"error: {told}", file=sys.stderr)
            if isinstance(told, MissingFile) and told.path and not Path(told.path).is_absolute() and "://" not in told.path:
                print(_looked_for(Path.cwd()), file=sys.stderr)
            raise typer.Exit(next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None

    class Command(typer.core.TyperCommand):
        def format_epilog(self, ctx: Any, formatter: Any) -> None:
            if config is not None:
                from jobs.settings import text

                formatter.write(f"\n{text(config)}")

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(cls=Command)(guarded)
    return app


def file_and_changes(config: str | None, overrides: list[str] | None) -> tuple[str | None, list[str]]:
    """The configuration file of a command line with `OptionalConfig`, if there is one, and the changes."""
    changes = list(overrides or ())
    if config is None or "=" not in config or Path(config).is_file():
        return config, changes
    return None, [config, *changes]  # the first change is in the file's place


def _looked_for(current: Path) -> str:
    """Where a relative path was looked for."""
    from pipelines.files import is_temporary

    if is_temporary(current):
        return (
            f"A submitted job runs in {current}, a copy of the working directory without what .gitignore names (runs/, for example): "
            "give absolute paths, of places that all nodes see"
        )
    return f"A relative path means the folder of the configuration file if something is there, else the current folder, {current}"
