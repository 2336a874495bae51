"""The console command `molmo`: every job under one name."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import click
import typer
from typer.core import TyperGroup
from typer.main import get_command

VERBS = ("prepare", "train", "evaluate", "register", "serve", "export", "inventory", "inspect", "demo")


class _Jobs(TyperGroup):
    """Loads a job's module (and with it Ray, torch and MLflow) only when its verb is used; help reads the docstrings."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command = get_command(importlib.import_module(f"jobs.{cmd_name}").app)
        command.name = cmd_name
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Jobs"):
            formatter.write_dl([(verb, summary(verb)) for verb in VERBS])


def summary(verb: str) -> str:
    """The first line of a job's module docstring, read without importing it."""
    source = (Path(__file__).parent / f"{verb}.py").read_text()
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


app = typer.Typer(cls=_Jobs, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True)


@app.callback()
def main() -> None:
    """Data, training and serving for the Molmo family of vision-language models, on Ray.

    `molmo JOB --help` describes a job; each also runs as `python -m jobs.JOB`.
    """


if __name__ == "__main__":
    app()
