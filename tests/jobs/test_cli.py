"""The console command offers every job, and each says what it does."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jobs import cli, settings

ROOT = Path(__file__).parent.parent.parent
HEAVY = ("torch", "ray", "mlflow", "transformers", "pyarrow")


def molmo(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, arguments, prog_name="molmo")


def test_every_job_is_a_verb():
    modules = {path.stem for path in (ROOT / "jobs").glob("*.py")} - {"__init__", "cli", "command", "settings"}
    assert set(cli.VERBS) == modules


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_overview(arguments):
    result = molmo(*arguments)
    for verb in cli.VERBS:
        assert verb in result.output
        words = cli.summary(verb)
        assert words.endswith("."), f"{verb}: the module's first line is its help: {words!r}"


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_each_job(verb):
    result = molmo(verb, "--help")
    assert result.exit_code == 0, result.output
    assert f"Usage: molmo {verb}" in result.stdout


@pytest.mark.parametrize("verb", settings.JOBS)
def test_help_lists_every_setting(verb):
    shown = molmo(verb, "--help").stdout
    for setting in settings.settings(settings.JOBS[verb]):
        assert f"\n  {setting.key}{'=' if setting.default else ''}{setting.default}  ({setting.type})\n" in shown
    assert "\n  optim.vit.lr=6e-06  (float ≥ 0)\n      Peak learning rate of AdamW.\n" in molmo("train", "--help").stdout


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_imports_nothing_heavy(verb):
    code = (
        f"import sys; sys.argv = ['molmo', {verb!r}, '--help']\nfrom jobs.cli import app\n"
        f"try: app()\nfinally: print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (run.returncode, run.stderr.strip()) == (0, "[]")


def test_the_page_of_settings_is_up_to_date():
    assert (ROOT / "docs/settings.md").read_text() == settings.page(), "python -m jobs.settings > docs/settings.md"


def test_wrong_verb():
    result = molmo("prepair")
    assert result.exit_code == 2
    assert "prepair" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("serve", "nowhere.yaml"), "nowhere.yaml: no such configuration file"),
        (("serve", "configs/serve/demo.yaml", "prot=1"), "Did you mean 'port'?"),
        (("serve", "configs/serve/demo.yaml", "port"), "not of the form key=value"),
        (("evaluate", "configs/evaluate/demo.yaml", "metric=bleu"), "metric"),
        (("register", "configs/register/demo.yaml", "name=''"), "name must be given"),
        (("demo", "steps=5"), "must begin with a stage"),
        (("demo", "trian.steps=5"), "Did you mean 'train'?"),
    ],
)
def test_wrong_configuration(arguments, words, monkeypatch):
    """One line that says what to do, no traceback, exit code 2."""
    monkeypatch.chdir(ROOT)
    result = molmo(*arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert "Traceback" not in result.stderr
