"""Puts the application together and keeps it up: `with serving(config) as url`."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import HTTPOptions

from molmo_core.config import read_yaml
from pipelines.model_folder import fixed_model
from pipelines.serving.alias import AliasWatcher
from pipelines.serving.config import FRONTEND_CPUS, ServeConfig
from pipelines.serving.frontend import PREPARING, Frontend
from pipelines.serving.keys import key_digests
from pipelines.serving.metrics import Collector
from pipelines.serving.playground import PageFile, page_files
from pipelines.serving.port import check_port
from pipelines.serving.replica import Replica

APPLICATION = "molmo"
# Nothing queues inside Serve: the replicas' hosts refuse what they cannot hold, and /health and /ready never stand behind requests.
OTHER_REQUESTS = 1024
MARGIN_S = 60.0
"""How much later than a frontend Serve itself gives up, if a frontend does not."""
UPSCALE_DELAY_S = 30.0
"""How long there must be more requests than a model's replicas have places for before there is another replica (Serve's default)."""


def build(config: ServeConfig) -> serve.Application:
    """The Serve application of a configuration: frontends that share the replicas of each model."""
    return _build(config, page_files(config), key_digests(config))


def app(args: dict[str, Any]) -> serve.Application:
    """The same for `serve run`, `serve deploy` and KubeRay: `import_path: pipelines.serving.app:app`.

    Args:
        args: settings of `ServeConfig`; `config`, if it is there, is a YAML file whose settings the others change.

    Raises:
        ConfigError: a setting is wrong.
    """
    settings = dict(args)
    path = settings.pop("config", None)
    from_file = read_yaml(path) if path else {}
    return build(ServeConfig.from_dict(from_file | settings, source=str(path or "args"), base=Path(path).parent if path else None))


def _build(config: ServeConfig, page: dict[str, PageFile], keys: list[bytes]) -> serve.Application:
    versions = [fixed_model(one.model) for one in config.each]
    collector = _deployment(Collector, "metrics", num_cpus=0, max_ongoing_requests=1024).bind()
    held = sum(one.most_replicas * (one.max_batch_size + one.max_queued_requests) for one in config.each)
    at_frontend = held + PREPARING + OTHER_REQUESTS
    served = []
    for number, (one, version) in enumerate(zip(config.each, versions)):
        name = "model" if not config.models else f"model-{number}-{re.sub(r'[^a-zA-Z0-9.-]', '-', one.served_name)}"
        replica = _deployment(
            Replica,
            name,
            num_cpus=one.cpus_per_replica,
            num_gpus=one.gpus_per_replica,
            health_check_period_s=5,
            max_ongoing_requests=config.frontends * at_frontend,
            graceful_shutdown_timeout_s=config.drain_s,
            **_replicas(one),
        )
        served.append((one, version, replica.bind(one, version, collector)))
    followed = [i for i, one in enumerate(config.each) if one.follow_alias]
    watchers = []
    if followed:
        models = [config.each[i].model for i in followed]
        watcher = _deployment(AliasWatcher, "alias", num_cpus=0)
        watchers = [watcher.bind(models, [versions[i] for i in followed], partial(_deploy, config, page, keys))]
    frontend = _deployment(
        Frontend,
        "frontend",
        num_cpus=FRONTEND_CPUS,
        num_replicas=config.frontends,
        max_ongoing_requests=at_frontend,
        graceful_shutdown_timeout_s=config.drain_s,
    )
    return frontend.bind(config, served, collector, page, keys, watchers)


def _deployment(kind: type, name: str, num_cpus: float, num_gpus: float = 0, **settings: Any) -> serve.Deployment:
    """Replaced processes start before the old ones stop."""
    settings = {"max_surge_percent": 100, "rolling_update_percentage": 1.0, "graceful_shutdown_wait_loop_s": 0.2} | settings
    return serve.deployment(name=name, ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus}, **settings)(kind)


def _replicas(one: ServeConfig) -> dict[str, Any]:
    if one.max_replicas is None:
        return {"num_replicas": one.replicas}
    scaling = {"min_replicas": one.replicas, "max_replicas": one.max_replicas, "target_ongoing_requests": one.max_batch_size}
    return {"autoscaling_config": {**scaling, "upscale_delay_s": UPSCALE_DELAY_S}}


def _deploy(config: ServeConfig, page: dict[str, PageFile], keys: list[bytes]) -> None:
    # Built from what the driver has read: on another machine the file with the keys may not be there.
    serve.run(_build(config, page, keys), name=APPLICATION, route_prefix="/", blocking=False)


@contextlib.contextmanager
def serving(config: ServeConfig) -> Iterator[str]:
    """Serves a model for the length of a `with` block, on the cluster that is connected; gives the URL.

    Serve itself stays up (other applications may use it) until the cluster ends.

    Raises:
        ConfigError: the port is taken.
    """
    check_port(config.host, config.port)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    page, keys = page_files(config), key_digests(config)
    serve.start(
        proxy_location="HeadOnly",
        http_options=HTTPOptions(host=config.host, port=config.port, request_timeout_s=config.timeout_s + MARGIN_S),
        logging_config={"enable_access_log": False},
    )
    try:
        _deploy(config, page, keys)
        yield config.url
    finally:
        serve.delete(APPLICATION)
