"""The console command `molmo`: every job under one name."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import typer

VERBS = ("prepare", "plan", "train", "evaluate", "register", "promote", "serve", "ask", "export", "inventory", "inspect", "demo")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True)


@app.callback()
def main() -> None:
    """Data, training and serving for the Molmo family of vision-language models, on Ray.

    `molmo JOB --help` describes a job; each also runs as `python -m jobs.JOB`.
    """


def summary(verb: str) -> str:
    """The first line of a job's module docstring, read without importing the module (nor Ray, torch and MLflow with it)."""
    source = (Path(__file__).parent / f"{verb}.py").read_text()
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def _add(verb: str) -> None:
    def run(context: typer.Context) -> None:
        importlib.import_module(f"jobs.{verb}").app(context.args, prog_name=f"molmo {verb}")

    # The job's own program reads all arguments, --help included.
    settings = {"ignore_unknown_options": True, "allow_extra_args": True}
    app.command(verb, help=summary(verb), add_help_option=False, context_settings=settings)(run)


for _verb in VERBS:
    _add(_verb)

if __name__ == "__main__":
    app()
