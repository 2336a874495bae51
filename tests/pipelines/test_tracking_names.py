"""Names with any characters in a real MLflow database: metrics and parameters take all, the registry refuses before it writes."""

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException
from mlflow.store.model_registry.dbmodels.models import SqlRegisteredModel
from mlflow.store.tracking.dbmodels.models import SqlExperiment, SqlRun

from pipelines import tracking

ODD = [
    "vqa@v2", "a:b", "a/b", "a//b", "/a", "../a", ".", "..", "...", "", " ", "läuf", "日本", "🎈", "it's", 'q"q', "a b ", "a\nb", "a\n",
    "\0", "x" * 300, "ä" * 300, "a.b", "a?b=c&d#e%20", "overall", "vqa_v2-shad94c285d", "\ud800", "e\u0308", "v1", "V12", "latest",
    "LATEST", "~x",
]  # fmt: skip
NAMES = st.one_of(st.sampled_from(ODD), st.text(max_size=30), st.text("ab./: @-_", max_size=8))
FUZZ = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def database(empty_database, tmp_path_factory):
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("tracking")
    shutil.copy(empty_database, folder)
    patch.chdir(folder)
    patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    yield tracking.client()
    patch.undo()


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.yaml").write_text("model_name: molmo\n")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@FUZZ
@given(st.lists(NAMES, unique=True, max_size=8))
@example(ODD)
def test_any_metric_and_any_parameter_is_logged_by_itself(database, names):
    datasets = {name: {"path": f"p{i}", "overrides": {name: i}} for i, name in enumerate(names)}
    with tracking.Run("fuzz", "run") as run:
        run.log_metrics({f"evaluation/{name}": i for i, name in enumerate(names)})
        run.log_metrics({name: -i for i, name in enumerate(names)})
        run.log_params({"datasets": datasets})
        run.log_params({"datasets": datasets})
    data = database.get_run(run.id).data
    assert [data.metrics[tracking.key(f"evaluation/{name}")] for name in names] == list(range(len(names)))
    assert [data.metrics[tracking.key(name)] for name in names] == [-i for i in range(len(names))]
    assert sum(key.startswith("evaluation/") for key in data.metrics) >= len(names)
    assert len(data.params) == 2 * len(names)
    assert sorted(data.params.values()) == sorted([f"p{i}" for i in range(len(names))] + [str(i) for i in range(len(names))])


@pytest.mark.parametrize("name", ["loss", "lr/llm", "evaluation/easy vqa", "a-b.c_d", "läuf", "a:b"])
def test_names_that_fit_stay(name):
    assert tracking.key(name) == name


def test_a_dot_in_a_name_is_not_a_level(database):
    with tracking.Run("fuzz", "dots") as run:
        run.log_params({"a.b": {"c": 1}, "a": {"b.c": 2, "b": {"c": 3}}})
    assert sorted(database.get_run(run.id).data.params.values()) == ["1", "2", "3"]


@FUZZ
@given(NAMES)
def test_any_run_name(database, name):
    run = tracking.Run("fuzz", name)
    run.finish()
    assert name.isprintable() is False or not name or database.get_run(run.id).info.run_name == name[: tracking.MAX_RUN_NAME]


def _all(database):
    """Everything that the database and its artifacts hold, in numbers."""
    models = database.search_registered_models()
    versions = [(v.name, v.version, tuple(v.aliases)) for v in database.search_model_versions()]
    experiments = database.search_experiments()
    runs = database.search_runs([e.experiment_id for e in experiments], max_results=1000)
    return len(models), versions, len(experiments), len(runs), sum(len(files) for *_, files in os.walk("mlartifacts"))


@FUZZ
@given(NAMES, st.one_of(NAMES, st.just("champion")))
@example("fine", "a b")
@example("a/b", "champion")
@example("new model", "latest")
@example("a@b", "v-1")
def test_the_registry_takes_a_name_or_is_left_as_it_was(database, checkpoint, name, alias):
    before = _all(database)
    try:
        version = tracking.register(checkpoint, name, alias)
    except tracking.TrackingError:
        assert _all(database) == before
    else:
        assert (tracking.resolve(f"models:/{name}@{alias}") / "model.safetensors").read_bytes() == b"weights"
        assert tracking.versioned(f"models:/{name}@{alias}") == f"models:/{name}/{version}"


@FUZZ
@given(NAMES, NAMES)
def test_names_are_refused_exactly_as_mlflow_does(database, name, alias):
    """But for what other databases than sqlite could not hold."""
    refused = _refuses(lambda: tracking.check_names(name, alias), tracking.TrackingError)
    if not (name + alias).isprintable() or len(name) > tracking.MAX_NAME:
        assert refused
    else:
        assert refused == _refuses(lambda: _put(database, name, alias), MlflowException)


def _refuses(call, kind):
    try:
        call()
    except kind:
        return True
    return False


def _put(database, name, alias):
    """A version under an alias, as MLflow does it; nothing stays."""
    if not _refuses(lambda: database.get_registered_model(name), MlflowException):
        database.delete_registered_model(name)
    database.create_registered_model(name)
    try:
        database.set_registered_model_alias(name, alias, database.create_model_version(name, source="/x").version)
    finally:
        database.delete_registered_model(name)


@pytest.mark.parametrize("refused", ["alias", "version"])
def test_what_a_server_refuses_later_is_taken_back(database, checkpoint, monkeypatch, refused):
    """A server may have rules of its own."""

    def refuse(*_, **__):
        raise MlflowException("not here")

    tracking.register(checkpoint, "kept", "champion")
    before = _all(database)[:2]
    monkeypatch.setattr(type(database), "set_registered_model_alias" if refused == "alias" else "create_model_version", refuse)
    for name in ("kept", "fresh"):
        with pytest.raises(tracking.TrackingError, match=f"cannot register .* as '{name}' .*not here"):
            tracking.register(checkpoint, name, "champion")
        assert _all(database)[:2] == before


@pytest.mark.parametrize("name", ["", "x" * 257, "a\ud800"])
def test_an_experiment_that_mlflow_refuses(database, name):
    before = _all(database)
    with pytest.raises(tracking.TrackingError, match="experiment="):
        tracking.Run(name, "run")
    assert _all(database) == before


@pytest.mark.parametrize("name", ["..", "a/b", "läuf", "x" * 256, "a#b", "a%20b", "~"])
def test_any_experiment_has_its_artifacts_in_a_folder_of_its_own(database, name):
    with tracking.Run(name, "run") as run:
        run.log_file(__file__)
    (found,) = Path("mlartifacts").glob(f"*/{run.id}/artifacts/{Path(__file__).name}")
    assert found.read_bytes() == Path(__file__).read_bytes()


def test_limits_are_those_of_mlflow_s_tables():
    assert SqlRegisteredModel.__table__.c["name"].type.length == tracking.MAX_NAME == SqlExperiment.__table__.c["name"].type.length
    assert SqlRun.__table__.c["name"].type.length == tracking.MAX_RUN_NAME
