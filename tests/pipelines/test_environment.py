"""The environment of processes: a variable of the user's wins, and the page lists every one."""

from pathlib import Path

from pipelines import environment

ROOT = Path(__file__).parents[2]
GROUPS = (environment.IMPORT, environment.WORKER, environment.LOCAL, environment.TRAINING, environment.ASCII_TAGS, environment.MLFLOW)


def test_what_is_set_already_stays(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.delenv("RAY_CHDIR_TO_TRIAL_DIR", raising=False)
    environment.defaults(environment.WORKER | environment.TRAINING)
    assert environment.os.environ["TOKENIZERS_PARALLELISM"] == "true"
    assert environment.os.environ["RAY_CHDIR_TO_TRIAL_DIR"] == "0"


def test_the_page_lists_every_variable():
    page = (ROOT / "docs/configuration.md").read_text()
    assert [name for group in GROUPS for name in group if f"`{name}`" not in page] == []


def test_nobody_else_sets_variables():
    """But for a token and an address, which are made at run time."""
    found = {
        path.relative_to(ROOT).as_posix()
        for package in ("molmo_core", "pipelines", "jobs")
        for path in (ROOT / package).rglob("*.py")
        if "environ.setdefault" in path.read_text() or "environ[" in path.read_text().replace("os.environ[name]", "")
    }
    assert found <= {"pipelines/environment.py", "pipelines/cluster.py", "pipelines/tracking/places.py"}
