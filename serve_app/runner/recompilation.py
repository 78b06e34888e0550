"""CompileCounter: how many Triton kernels this process had to compile, or load, since it was started. Knows no kernel.

A kernel that is compiled during a step stalls every stream for seconds, so after start-up the count must stay 0. What
makes Triton compile again: another constexpr, another element type, an integer argument that is 1 or a multiple of 16
where it was not, a pointer that is not aligned to 16 bytes where it was.
"""

from __future__ import annotations

from typing import Any

from serve_app.logs import get_logger

logger = get_logger(__name__)


class CompileCounter:
    """Counts from `start` on. The hook is Triton's own (triton.knobs.runtime.jit_post_compile_hook, 3.4 and later).

    It is called for each variant that is new to this process, also where Triton finds it compiled on the disk.
    """

    def __init__(self) -> None:
        self.num_compiled = 0
        self.names: list[str] = []
        self._is_started = False

    def start(self) -> None:
        """From now on a compilation is counted, and said in the log."""
        import triton

        if self._is_started:
            return
        self._is_started = True
        runtime = triton.knobs.runtime
        before = runtime.jit_post_compile_hook

        def hook(**details: Any) -> Any:
            self._count(str(details.get("repr", details.get("key", "a kernel"))))
            return before(**details) if before is not None else None

        runtime.jit_post_compile_hook = hook

    def _count(self, name: str) -> None:
        self.num_compiled += 1
        self.names.append(name)
        logger.warning("a kernel was compiled after start-up, and every stream waited for it: %s", name)
