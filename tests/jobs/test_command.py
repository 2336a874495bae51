"""What every job's command line does with errors."""

import pytest
from typer.testing import CliRunner

from jobs.command import ConfigPath, Overrides, job
from molmo_core.config import ConfigError
from pipelines.training.errors import NonFiniteError, TrainingError


def invoke(error: BaseException | None, *arguments: str):
    seen = []

    def main(config: ConfigPath, overrides: Overrides = None) -> None:
        """Does something."""
        seen.append((str(config), overrides))
        if error is not None:
            raise error

    return CliRunner().invoke(job(main), arguments), seen


def test_arguments():
    result, seen = invoke(None, "a.yaml", "x.y=1", "z=[1,2]")
    assert result.exit_code == 0
    assert seen == [("a.yaml", ["x.y=1", "z=[1,2]"])]
    assert invoke(None, "a.yaml")[1] == [("a.yaml", None)]


def test_help_is_the_docstring():
    result, _ = invoke(None, "--help")
    assert "Does something." in result.output
    assert "CONFIG" in result.output


def test_configuration_error():
    result, _ = invoke(ConfigError("no such key"), "a.yaml")
    assert result.exit_code == 2
    assert result.stderr == "error: no such key\n"


@pytest.mark.parametrize("error", [TrainingError("the disk is full"), NonFiniteError("step 2: loss nan")])
def test_a_training_that_cannot_continue(error):
    """In every job that trains."""
    result, _ = invoke(error, "a.yaml")
    assert result.exit_code == 1
    assert result.stderr == f"error: {error}\n"


def test_configuration_error_of_a_worker():
    """Ray raises a subclass whose text is the remote traceback and whose `cause` is the error."""

    class FromWorker(ConfigError):
        cause = ConfigError("port 1 is in use")

    result, _ = invoke(FromWorker("Traceback ... lines and lines"), "a.yaml")
    assert result.stderr == "error: port 1 is in use\n"


def test_interrupt():
    assert invoke(KeyboardInterrupt(), "a.yaml")[0].exit_code == 130


def test_other_errors_keep_their_traceback():
    result, _ = invoke(ZeroDivisionError("x"), "a.yaml")
    assert isinstance(result.exception, ZeroDivisionError)


def test_missing_configuration():
    result, seen = invoke(None)
    assert result.exit_code == 2
    assert seen == []
    assert "CONFIG" in result.stderr
