"""The environment of all processes: every variable that is set, and why (docs/configuration.md lists them). A value of the user's wins."""

from __future__ import annotations

import os
from collections.abc import Mapping

# `pipelines.cluster` is the one place that starts Ray. Without this, any late call into Ray (a thread that Ray Data leaves behind
# when a run breaks off is enough) starts a second cluster with default settings. Ray reads it when it is imported.
IMPORT = {"RAY_ENABLE_AUTO_CONNECT": "0"}

WORKER = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
    # glibc gives large blocks back to the kernel with each `free`, and every page of the next one is a fault: 3 MB of pixels take
    # longer to be given memory than to be copied. 32 MiB is the most that the first may be.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
    # On a busy machine the HTTP proxy takes longer to start than the 5 s after which Serve kills it.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30",
    # It asks another frontend if one is lost.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "pipelines.serving.resend.middleware",
}
"""Of the driver and of all workers, whoever started the cluster."""

LOCAL = {
    # Ray Train looks at its workers every 2 s by default, which delays every checkpoint and the end of a run by as much.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # Figures of every process and a record of every task, for a dashboard that is not there.
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    # Workers that wait for work wake up a hundred times a second.
    "RAY_prestart_worker_first_driver": "0",
}
"""Of a cluster that is started here."""

TRAINING = {
    # Workers keep the driver's folder: relative paths mean the same.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}

ASCII_TAGS = {
    # The tags of Ray's dashboard are ASCII: a run with another name would end with an error of its controller.
    "RAY_TRAIN_METRICS_ENABLED": "0",
}

MLFLOW = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # MLflow would ask a server that does not answer seven times, two minutes each.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}


def defaults(variables: Mapping[str, str]) -> None:
    """Sets variables of this process (and of those that it starts) that are not set."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)
