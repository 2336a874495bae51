"""The Kubernetes manifests: KubeRay takes them, and what they name is there."""

import copy
import importlib
import re
import shlex
from pathlib import Path

import kuberay
import pytest
import ray
import yaml
from ray.serve.schema import ServeDeploySchema

from pipelines.serving.config import ServeConfig
from pipelines.training.config import TrainConfig

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted(path for path in DEPLOY.glob("*.yaml") if path.name.startswith("ray"))
SERVICES = [path for path in MANIFESTS if path.name.startswith("rayservice")]


def load(path: Path) -> dict:
    (manifest,) = yaml.safe_load_all(path.read_text())
    return manifest


def cluster(manifest: dict) -> dict:
    spec = manifest["spec"]
    return spec["rayClusterConfig" if manifest["kind"] == "RayService" else "rayClusterSpec"]


def pods(manifest: dict) -> list[dict]:
    groups = [cluster(manifest)["headGroupSpec"], *cluster(manifest)["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_there_are_manifests():
    assert [path.stem for path in MANIFESTS] == ["rayjob-train", "rayservice-cpu", "rayservice-gpu"]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_kuberay_takes_it(path):
    assert kuberay.faults(load(path)) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda spec: spec.update(rayClusterConfg={}), "no field rayClusterConfg"),
        (lambda spec: spec.pop("rayClusterConfig"), "rayClusterConfig is missing"),
        (lambda spec: spec["upgradeStrategy"].update(type="Rolling"), "'Rolling' is not one of"),
        (lambda spec: spec["rayClusterConfig"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}), "0 is not a string"),
        (lambda spec: spec["rayClusterConfig"]["workerGroupSpecs"][0].update(replicas="2"), "'2' is not a integer"),
        (lambda spec: spec["rayClusterConfig"]["headGroupSpec"]["template"]["spec"].update(containrs=[]), "containrs"),
        (lambda spec: spec["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0].pop("name"), "'name' is a required"),
    ],
)
def test_the_check_notices_what_is_wrong(change, words):
    manifest = copy.deepcopy(load(DEPLOY / "rayservice-cpu.yaml"))
    change(manifest["spec"])
    (fault,) = kuberay.faults(manifest)
    assert words in fault


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_versions_and_images(path):
    manifest = load(path)
    assert cluster(manifest)["rayVersion"] == ray.__version__ == re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
    images = {container["image"] for pod in pods(manifest) for container in pod["containers"]}
    assert len(images) == 1, "Ray's head and workers have the same Python and packages"
    gpus = any("nvidia.com/gpu" in c["resources"]["requests"] for pod in pods(manifest) for c in pod["containers"])
    assert images.pop().endswith(":gpu" if gpus else ":cpu")


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_pods_are_confined_and_hold_no_secrets(path):
    for pod in pods(load(path)):
        assert pod["securityContext"]["runAsNonRoot"]
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
            for variable in container["env"]:
                secret = re.search("KEY|TOKEN|PASSWORD|SECRET", variable["name"])
                assert ("secretKeyRef" in variable.get("valueFrom", {})) == bool(secret), variable["name"]


@pytest.mark.parametrize("path", SERVICES, ids=lambda path: path.stem)
def test_ray_serve_takes_the_application(path):
    config = ServeDeploySchema.model_validate(yaml.safe_load(load(path)["spec"]["serveConfigV2"]))
    (application,) = config.applications
    module, _, name = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    settings = dict(application.args)
    recipe = ROOT / Path(settings.pop("config")).relative_to("/app")
    served = ServeConfig.load(recipe, [f"{key}={value}" for key, value in settings.items()])
    assert served.model == "models:/mine@champion"
    assert config.http_options.request_timeout_s > served.timeout_s, "the server says that the time is over, not the proxy"
    assert load(path)["spec"]["rayClusterDeletionDelaySeconds"] >= served.timeout_s, "answers in work outlive a change of clusters"


@pytest.mark.parametrize("path", SERVICES, ids=lambda path: path.stem)
def test_the_replicas_fit_on_the_workers(path):
    manifest = load(path)
    (application,) = yaml.safe_load(manifest["spec"]["serveConfigV2"])["applications"]
    (group,) = cluster(manifest)["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    args, requests = application["args"], container["resources"]["requests"]
    served = ServeConfig(**{key: value for key, value in args.items() if key != "config"})
    on_a_worker = int(requests["nvidia.com/gpu"]) // served.gpus_per_replica if served.gpus_per_replica else 1
    assert served.replicas <= group["minReplicas"] * on_a_worker
    assert served.cpus_per_replica + served.frontends / group["minReplicas"] * 0.1 <= int(requests["cpu"])
    assert served.most_replicas <= group["maxReplicas"] * on_a_worker
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_training_job_starts(golden):
    manifest = load(DEPLOY / "rayjob-train.yaml")
    python, flag, module, recipe, *overrides = shlex.split(manifest["spec"]["entrypoint"])
    assert (python, flag) == ("python", "-m")
    assert hasattr(importlib.import_module(module), "main")
    given = [f"init_from={golden / 'molmo-qwen2-clip'}" if word.startswith("init_from=") else word for word in overrides]
    config = TrainConfig.load(ROOT / Path(recipe).relative_to("/app"), given)
    (group,) = cluster(manifest)["workerGroupSpecs"]
    assert config.num_workers == group["replicas"], "a worker for each GPU"
    mounts = {mount["mountPath"] for pod in pods(manifest) for container in pod["containers"] for mount in container["volumeMounts"]}
    assert mounts == {"/shared"}
    for word in overrides:
        key, _, value = word.partition("=")
        assert value.startswith("/shared/") or not value.startswith(("/", ".")), f"{key}: {value} is on no volume"
