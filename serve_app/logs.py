"""One log format for every process. Knows handlers and levels; knows nothing of what is logged."""

from __future__ import annotations

import logging
import sys

ROOT = "serve_app"


def get_logger(name: str) -> logging.Logger:
    """The logger of a module (pass ``__name__``). INFO goes to stderr, unless the application has set logging up."""
    root = logging.getLogger(ROOT)
    if not root.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
        root.addHandler(handler)
        root.propagate = False
        if root.level == logging.NOTSET:
            root.setLevel(logging.INFO)
    return logging.getLogger(name)
