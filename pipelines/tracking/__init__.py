"""MLflow: runs with their metrics and pictures, and the registry whose aliases decide what is served.

The database is `runs/mlflow.db` unless `MLFLOW_TRACKING_URI` names another one or a server. Only the driver of a job writes to
it: workers send their numbers to the driver, so a cluster's nodes need no access to the database and never race for it.
"""

from pipelines.tracking.names import MAX_NAME, MAX_RUN_NAME, TrackingError, check_names, key
from pipelines.tracking.places import RUNS, client, tracking_uri
from pipelines.tracking.runs import EVALUATION, TRAINING_PAGES, Run, known_experiment
from pipelines.tracking.versions import CHECKPOINT, check_checkpoint, check_model, register, resolve, version_of, versioned

__all__ = [
    "CHECKPOINT",
    "EVALUATION",
    "MAX_NAME",
    "MAX_RUN_NAME",
    "RUNS",
    "TRAINING_PAGES",
    "Run",
    "TrackingError",
    "check_checkpoint",
    "check_model",
    "check_names",
    "client",
    "key",
    "known_experiment",
    "register",
    "resolve",
    "tracking_uri",
    "version_of",
    "versioned",
]
