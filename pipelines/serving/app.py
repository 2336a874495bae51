"""Puts the application together and keeps it up: `with serving(config) as url`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from ray import serve
from ray.serve.config import HTTPOptions

from pipelines.model_folder import fixed_model
from pipelines.serving.config import FRONTEND_CPUS, ServeConfig
from pipelines.serving.frontend import PREPARING, Frontend
from pipelines.serving.keys import key_digests
from pipelines.serving.playground import page_files
from pipelines.serving.port import check_port
from pipelines.serving.replica import Replica

APPLICATION = "molmo"
# Nothing queues inside Serve: the replicas' hosts refuse what they cannot hold, and /health and /ready never stand behind requests.
OTHER_REQUESTS = 1024
MARGIN_S = 60.0
"""How much later than a frontend Serve itself gives up, if a frontend does not."""


def build(config: ServeConfig) -> serve.Application:
    """The Serve application of a configuration: frontends that share the replicas of the model."""
    model = fixed_model(config.model)
    page = page_files(config)
    keys = key_digests(config)
    held = config.replicas * (config.max_batch_size + config.max_queued_requests)  # requests that the replicas hold together
    at_frontend = held + PREPARING + OTHER_REQUESTS
    replica = serve.deployment(
        name="model",
        num_replicas=config.replicas,
        ray_actor_options={"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica},
        max_ongoing_requests=config.frontends * at_frontend,
        health_check_period_s=5,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=5,
    )(Replica)
    frontend = serve.deployment(
        name="frontend",
        num_replicas=config.frontends,
        ray_actor_options={"num_cpus": FRONTEND_CPUS},
        max_ongoing_requests=at_frontend,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=5,
    )(Frontend)
    return frontend.bind(config, model, replica.bind(config, model), page, keys)


@contextlib.contextmanager
def serving(config: ServeConfig) -> Iterator[str]:
    """Serves a model for the length of a `with` block, on the cluster that is connected; gives the URL.

    Serve itself stays up (other applications may use it) until the cluster ends.

    Raises:
        ConfigError: the port is taken.
    """
    check_port(config.host, config.port)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    application = build(config)
    serve.start(
        proxy_location="HeadOnly",
        http_options=HTTPOptions(host=config.host, port=config.port, request_timeout_s=config.timeout_s + MARGIN_S),
        logging_config={"enable_access_log": False},
    )
    try:
        serve.run(application, name=APPLICATION, route_prefix="/", blocking=False)
        yield config.url
    finally:
        serve.delete(APPLICATION)
