"""Whether Ray Serve has told this process's replica to leave. Knows one private flag of Ray's; knows nothing of what leaves.

Serve tells user code only when the drain is over (``__del__``). Yet its replica knows at once: the actor's own
`_shutting_down` is what its health checks answer by (read in Ray 2.60, serve/_private/replica.py). The other way, to look
for oneself in the sets of replicas that the controller sends out, is wrong for a while after a controller was restarted.
"""

from __future__ import annotations

from ray._private.worker import global_worker

LOOK_SECONDS = 0.1
"""Between two looks. Below graceful_shutdown_wait_loop_s, after which an idle replica has left."""


def is_leaving() -> bool:
    """To be asked in a replica of Ray Serve, once from its ``__init__``: raises LookupError or AttributeError where Ray has
    changed."""
    return bool(global_worker.actors[global_worker.actor_id]._replica_impl._shutting_down)
