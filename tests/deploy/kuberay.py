"""The fields of KubeRay's resources (ray.io/v1, KubeRay 1.6.2), written down from its API reference, and a check against them.

The operator's own schema has 20,000 lines because it holds Kubernetes' pods many times over; these are checked with Kubernetes' schema.
"""

from collections.abc import Iterator
from typing import Any

import kubernetes_validate

KUBERNETES = "1.32"

INTEGER, BOOLEAN, STRING, NUMBER = "integer", "boolean", "string", "number"
STRINGS = {STRING: STRING}
POD, SERVICE, RESOURCES = "Pod", "Service", "resources of a container"

FIELDS: dict[str, dict[str, Any]] = {
    "RayServiceSpec": {
        "serveConfigV2": STRING, "rayClusterConfig": "RayClusterSpec", "upgradeStrategy": "RayServiceUpgradeStrategy",
        "rayClusterDeletionDelaySeconds": INTEGER, "excludeHeadPodFromServeSvc": BOOLEAN, "serveService": SERVICE, "managedBy": STRING,
    },
    "RayServiceUpgradeStrategy": {
        "type": {"NewCluster", "NewClusterWithIncrementalUpgrade", "None"}, "clusterUpgradeOptions": "ClusterUpgradeOptions",
    },
    "ClusterUpgradeOptions": {
        "maxSurgePercent": INTEGER, "stepSizePercent": INTEGER, "intervalSeconds": INTEGER, "gatewayClassName": STRING,
    },
    "RayJobSpec": {
        "entrypoint": STRING, "rayClusterSpec": "RayClusterSpec", "activeDeadlineSeconds": INTEGER, "preRunningDeadlineSeconds": INTEGER,
        "backoffLimit": INTEGER, "submitterPodTemplate": POD, "submitterConfig": "SubmitterConfig", "metadata": STRINGS,
        "clusterSelector": STRINGS, "managedBy": STRING, "runtimeEnvYAML": STRING, "jobId": STRING,
        "submissionMode": {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"}, "entrypointResources": STRING,
        "entrypointNumCpus": NUMBER, "entrypointNumGpus": NUMBER, "ttlSecondsAfterFinished": INTEGER,
        "shutdownAfterJobFinishes": BOOLEAN, "suspend": BOOLEAN,
    },
    "SubmitterConfig": {"backoffLimit": INTEGER},
    "RayClusterSpec": {
        "rayVersion": STRING, "headGroupSpec": "HeadGroupSpec", "workerGroupSpecs": ["WorkerGroupSpec"], "authOptions": "AuthOptions",
        "enableInTreeAutoscaling": BOOLEAN, "autoscalerOptions": "AutoscalerOptions", "headServiceAnnotations": STRINGS,
        "gcsFaultToleranceOptions": "GcsFaultToleranceOptions", "suspend": BOOLEAN, "managedBy": STRING,
        "upgradeStrategy": "RayClusterUpgradeStrategy",
    },
    "RayClusterUpgradeStrategy": {"type": {"Recreate", "None"}},
    "AuthOptions": {"mode": {"disabled", "token"}, "secretName": STRING, "enableK8sTokenAuth": BOOLEAN},
    "AutoscalerOptions": {
        "idleTimeoutSeconds": INTEGER, "upscalingMode": {"Default", "Aggressive", "Conservative"}, "version": {"v1", "v2"}, "image": STRING,
        "imagePullPolicy": {"Always", "IfNotPresent", "Never"}, "resources": RESOURCES,
    },
    "GcsFaultToleranceOptions": {
        "redisAddress": STRING, "redisUsername": "RedisCredential", "redisPassword": "RedisCredential", "externalStorageNamespace": STRING,
    },
    "RedisCredential": {"value": STRING, "valueFrom": {STRING: {STRING: STRING}}},
    "HeadGroupSpec": {
        "template": POD, "rayStartParams": STRINGS, "serviceType": {"ClusterIP", "NodePort", "LoadBalancer"}, "headService": SERVICE,
        "enableIngress": BOOLEAN, "resources": STRINGS, "labels": STRINGS,
    },
    "WorkerGroupSpec": {
        "groupName": STRING, "replicas": INTEGER, "minReplicas": INTEGER, "maxReplicas": INTEGER, "numOfHosts": INTEGER,
        "idleTimeoutSeconds": INTEGER, "rayStartParams": STRINGS, "template": POD, "resources": STRINGS, "labels": STRINGS,
    },
}  # fmt: skip
REQUIRED = {
    "RayServiceSpec": ("serveConfigV2", "rayClusterConfig"),
    "RayJobSpec": ("entrypoint", "rayClusterSpec"),
    "RayClusterSpec": ("headGroupSpec", "rayVersion"),
    "HeadGroupSpec": ("template", "rayStartParams"),
    "WorkerGroupSpec": ("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
}
_PYTHON = {INTEGER: int, BOOLEAN: bool, STRING: str, NUMBER: (int, float)}


def faults(manifest: dict[str, Any]) -> list[str]:
    """What is wrong with a RayService or a RayJob; empty: nothing."""
    kind = f"{manifest.get('kind')}Spec"
    if manifest.get("apiVersion") != "ray.io/v1" or kind not in ("RayServiceSpec", "RayJobSpec"):
        return [f"not a RayService or RayJob of ray.io/v1: {manifest.get('apiVersion')} {manifest.get('kind')}"]
    found = [f"unknown field {name}" for name in manifest.keys() - {"apiVersion", "kind", "metadata", "spec"}]
    return [*found, *_faults(manifest.get("spec"), kind, "spec")]


def _faults(value: Any, kind: Any, where: str) -> Iterator[str]:
    match kind:
        case set():
            if value not in kind:
                yield f"{where}: {value!r} is not one of {sorted(kind)}"
        case [inner] if isinstance(value, list):
            for i, item in enumerate(value):
                yield from _faults(item, inner, f"{where}[{i}]")
        case dict() if isinstance(value, dict):
            for name, item in value.items():
                yield from _faults(item, kind[STRING], f"{where}.{name}")
        case "Pod":
            yield from _kubernetes(value, {"apiVersion": "v1", "kind": "Pod"} | (value if isinstance(value, dict) else {}), where)
        case "Service":
            yield from _kubernetes(value, {"apiVersion": "v1", "kind": "Service"} | (value if isinstance(value, dict) else {}), where)
        case "resources of a container":
            containers = [{"name": "a", "image": "i", "resources": value}]
            yield from _kubernetes(value, {"apiVersion": "v1", "kind": "Pod", "spec": {"containers": containers}}, where)
        case str() if kind in _PYTHON:
            if not isinstance(value, _PYTHON[kind]) or (kind != BOOLEAN and isinstance(value, bool)):
                yield f"{where}: {value!r} is not a {kind}"
        case str() if isinstance(value, dict):
            yield from (f"{where}: {name} is missing" for name in REQUIRED.get(kind, ()) if name not in value)
            for name, item in value.items():
                if name in FIELDS[kind]:
                    yield from _faults(item, FIELDS[kind][name], f"{where}.{name}")
                else:
                    yield f"{where}: {kind} has no field {name}"
        case _:
            yield f"{where}: {value!r} is not of the right form"


def _kubernetes(value: Any, resource: dict[str, Any], where: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{where}: {value!r} is not of the right form"
        return
    try:
        kubernetes_validate.validate(resource, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{where}.{'.'.join(map(str, error.path))}: {error.message[:200]}"
