"""Where MLflow keeps runs and models: the address of its database or server, and a client of it."""

from __future__ import annotations

import fcntl
import logging
import os
import re
from pathlib import Path

import mlflow
import requests
from mlflow.utils.file_utils import local_file_uri_to_path
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from pipelines import environment
from pipelines.files import is_temporary
from pipelines.names import masked
from pipelines.tracking.names import TrackingError

environment.defaults(environment.MLFLOW)

RUNS = Path("runs")
CONNECT_TIMEOUT_S = 5


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, or the sqlite database `runs/mlflow.db`; a relative path of a database counts from the current folder.

    Raises:
        TrackingError: not an address, or a database that would be deleted with a submitted job's working directory.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI")
    uri = given or _sqlite(RUNS / "mlflow.db")
    if not re.match(r"(?!file:)[\w+.-]+:", uri):
        path = local_file_uri_to_path(uri)
        raise TrackingError(f"MLFLOW_TRACKING_URI={given}: MLflow wants a database or a server, e.g. {_sqlite(Path(path) / 'mlflow.db')}")
    if not uri.startswith("sqlite:"):
        return uri
    database = database_of(uri)
    if is_temporary(database):
        raise TrackingError(
            f"MLflow's database would be {database}, in the copy of a submitted job's working directory, which Ray deletes. "
            "`ray job submit` passes on only the variables that it is told: "
            """--runtime-env-json '{"env_vars": {"MLFLOW_TRACKING_URI": "http://..."}}'"""
        )
    return str(make_url(uri).set(database=str(database)))


def _sqlite(database: Path) -> str:
    return str(URL.create("sqlite", database=str(database.absolute())))


def database_of(uri: str) -> Path:
    """The file of a sqlite address."""
    try:
        name = make_url(uri).database
    except ArgumentError as error:
        raise TrackingError(f"MLFLOW_TRACKING_URI={masked(uri)}: {error}") from None
    if not name:
        raise TrackingError(f"MLFLOW_TRACKING_URI={masked(uri)}: names no file; write sqlite:///path of the database")
    return Path(name).absolute()


def client() -> mlflow.MlflowClient:
    """A client of the tracking store and registry; creates the database on first use.

    Sets `MLFLOW_TRACKING_URI`, so that processes started from here (a local cluster's workers) use the same store.

    Raises:
        TrackingError: the address is wrong, or nothing answers there.
    """
    uri = tracking_uri()
    os.environ["MLFLOW_TRACKING_URI"] = uri
    mlflow.set_tracking_uri(uri)
    if not uri.startswith("sqlite:"):
        if uri.startswith(("http://", "https://")):
            _check_answers(uri)
        return mlflow.MlflowClient()
    database = database_of(uri)
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        # Several processes that create the tables at once break each other.
        with open(database.with_suffix(".lock"), "w") as lock, open(database, "ab"):
            fcntl.flock(lock, fcntl.LOCK_EX)
            logging.getLogger("alembic").setLevel(logging.WARNING)
            logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
            opened = mlflow.MlflowClient()
            opened.search_experiments(max_results=1)
    except OSError as error:
        raise TrackingError(f"MLflow's database {database} cannot be written: {error}") from None
    return opened


def _check_answers(uri: str) -> None:
    """MLflow itself would try again for minutes."""
    try:
        requests.get(f"{uri.rstrip('/')}/health", timeout=CONNECT_TIMEOUT_S)  # any answer will do
    except requests.RequestException as error:
        problem = "it takes too long" if isinstance(error, requests.Timeout) else "connection refused, or no such host"
        raise TrackingError(f"MLFLOW_TRACKING_URI={masked(uri)}: no MLflow server answers there ({problem})") from None
