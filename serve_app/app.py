"""The application builder of deploy/*.yaml, and the one file that knows every part.

    serve run deploy/config.yaml                           import_path: serve_app.app:build
    python -m serve_app.app --check deploy/config.yaml     says what is wrong with a file, without a cluster

What the YAML says under ``deployments`` (replicas, resources, user_config) Ray Serve lays over the options here.
"""

import sys
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from serve_app import check_config
from serve_app.api.ingress import Ingress
from serve_app.config import GRACEFUL_SHUTDOWN_SECONDS, INGRESS, MAX_ONGOING_REQUESTS, REPLICA, ServeArgs
from serve_app.replica.load import environment
from serve_app.replica.replica import Replica
from serve_app.routing.targeted_router import TargetedRouter


def build(args: dict[str, Any]) -> Application:
    """Ray Serve's application for ``args``. Raises ConfigurationError with a sentence for each thing that is wrong."""
    checked = ServeArgs.parse(args)
    plain = checked.model_dump()
    replica: Any = serve.deployment(
        Replica,  # type: ignore[arg-type]
        name=REPLICA,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=GRACEFUL_SHUTDOWN_SECONDS,
        health_check_period_s=1,
        health_check_timeout_s=10,
        ray_actor_options={"num_cpus": 0.25, "runtime_env": {"env_vars": environment(checked)}},
        request_router_config=RequestRouterConfig(request_router_class=TargetedRouter),  # type: ignore[arg-type]
        logging_config={"enable_access_log": False},
    )
    ingress: Any = serve.deployment(
        serve.ingress()(Ingress),
        name=INGRESS,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=GRACEFUL_SHUTDOWN_SECONDS,
        health_check_period_s=1,
        health_check_timeout_s=10,
        ray_actor_options={"num_cpus": 0.1},
        max_surge_percent=100,  # a new version starts before the old one drains: no gap, even with one ingress
        user_config={},
    )
    return ingress.bind(plain, replica.bind(plain))


if __name__ == "__main__":
    sys.exit(check_config.main(sys.argv[1:]))
