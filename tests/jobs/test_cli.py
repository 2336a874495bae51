"""The console command offers every job, and each says what it does."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs import cli

ROOT = Path(__file__).parent.parent.parent


def molmo(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "jobs.cli", *arguments], capture_output=True, text=True, cwd=ROOT, check=False)


def test_every_job_is_a_verb():
    modules = {path.stem for path in (ROOT / "jobs").glob("*.py")} - {"__init__", "cli", "command"}
    assert set(cli.VERBS) == modules


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_overview(arguments):
    result = CliRunner().invoke(cli.app, arguments)
    for verb in cli.VERBS:
        assert verb in result.output
        words = cli.summary(verb)
        assert words.endswith("."), f"{verb}: the module's first line is its help: {words!r}"


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_each_job(verb):
    result = molmo(verb, "--help")
    assert result.returncode == 0, result.stderr
    assert f"Usage: molmo {verb}" in result.stdout


def test_wrong_verb():
    result = molmo("prepair")
    assert result.returncode == 2
    assert "prepair" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("serve", "nowhere.yaml"), "nowhere.yaml: no such configuration file"),
        (("serve", "configs/serve/demo.yaml", "prot=1"), "Did you mean 'port'?"),
        (("serve", "configs/serve/demo.yaml", "port"), "not of the form key=value"),
        (("evaluate", "configs/evaluate/demo.yaml", "metric=bleu"), "metric"),
        (("register", "configs/register/demo.yaml", "name="), "name must be given"),
        (("demo", "steps=5"), "must begin with a stage"),
        (("demo", "trian.steps=5"), "Did you mean 'train'?"),
    ],
)
def test_wrong_configuration(arguments, words):
    """One line that says what to do, no traceback, exit code 2."""
    result = molmo(*arguments)
    assert result.returncode == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr
