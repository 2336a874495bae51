import os

# `pipelines.cluster` is the one place that starts Ray. Without this, any late call into Ray (a thread that Ray Data leaves behind
# when a run breaks off is enough) starts a second cluster with default settings. Ray reads it when it is imported.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
