"""Holds the walls: every file of serve_app has a place in one order, and imports only what its room may use.

Three walls. The core is standard library and numpy. The device side adds torch, Triton and numba, and no Ray. The service
is Ray and HTTP, and loads torch only inside a replica. Imports are read with `ast`, wherever in a file they stand; a few
subprocesses check what really gets loaded. Knows nothing of what the files do.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PACKAGE = "serve_app"


@dataclass(frozen=True)
class Room:
    """A part of the house. Third-party packages and project files it may use, beside the standard library."""

    name: str
    packages: frozenset[str]
    files: tuple[str, ...]
    """Patterns of the project files it may import, if they also stand earlier in ORDER."""


CORE_FILES = (
    "errors.py",
    "logs.py",
    "engine/*.py",
    *("routing/leases.py", "routing/ledger_options.py", "routing/estimates.py", "routing/watch.py"),
    *("routing/wait_queue.py", "routing/lease_book.py", "routing/placement.py", "routing/admission.py"),
    *("routing/rebuilding.py", "routing/ledger.py", "routing/metrics_board.py"),
    "replica/lease_table.py",
)
TEXT_PACKAGES = frozenset({"numpy", "tokenizers", "jinja2", "huggingface_hub", "llguidance"})
DEVICE_PACKAGES = frozenset(
    {"numpy", "torch", "triton", "numba", "llvmlite", "safetensors", "huggingface_hub", "transformers", "tqdm"}
)
SERVICE_PACKAGES = frozenset({"ray", "grpc", "pydantic", "pydantic_core", "fastapi", "starlette", "prometheus_client"})

CORE = Room("core", frozenset({"numpy"}), CORE_FILES)
TEXT = Room("text", TEXT_PACKAGES, ("errors.py", "logs.py", "engine/request.py", "text/*.py"))
DEVICE = Room(
    "device",
    DEVICE_PACKAGES,
    (*CORE_FILES, "hub.py", "text/token_masks.py", "kernels/*.py", "models/*.py", "runner/*.py"),
)
OFFLINE = Room("offline", DEVICE_PACKAGES, (*CORE_FILES, "text/*.py", "kernels/*.py", "models/*.py", "runner/*.py"))
SERVICE = Room(
    "service",
    SERVICE_PACKAGES,
    (
        *(*CORE_FILES, "hub.py", "text/*.py", "config.py", "metrics.py", "api/*.py", "routing/*.py"),
        *("replica/messages.py", "replica/kept.py", "replica/channel.py", "replica/ray_transport.py"),
    ),
)
REPLICA = Room("replica", SERVICE_PACKAGES | DEVICE_PACKAGES, (*SERVICE.files, *DEVICE.files, "replica/*.py"))
ASSEMBLY = Room("assembly", SERVICE_PACKAGES | {"yaml"}, ("*",))
ALONE = Room("alone", frozenset(), ())
DEMO_TEXT = Room("demo text", frozenset(), ("demo_model/*.py",))
DEMO = Room(
    "demo", frozenset({"torch", "tokenizers", "safetensors"}), ("logs.py", "llm.py", "text/*.py", "demo_model/*.py")
)

ORDER: tuple[tuple[str, Room], ...] = (
    ("errors.py", CORE),
    ("logs.py", CORE),
    ("hub.py", TEXT),
    ("engine/config.py", CORE),
    ("engine/request.py", CORE),
    ("engine/pooling.py", CORE),
    ("engine/sequence.py", CORE),
    ("engine/block_pool.py", CORE),
    ("engine/step_record.py", CORE),
    ("engine/totals.py", CORE),
    ("engine/scheduler.py", CORE),
    ("engine/engine.py", CORE),
    ("engine/recent_steps.py", CORE),
    ("engine/compiling.py", CORE),
    ("engine/async_engine.py", CORE),
    ("engine/simulated_runner.py", CORE),
    ("engine/baselines.py", CORE),
    ("engine/timeline.py", CORE),
    ("routing/leases.py", CORE),
    ("routing/ledger_options.py", CORE),
    ("routing/estimates.py", CORE),
    ("routing/watch.py", CORE),
    ("routing/wait_queue.py", CORE),
    ("routing/lease_book.py", CORE),
    ("routing/admission.py", CORE),
    ("routing/placement.py", CORE),
    ("routing/rebuilding.py", CORE),
    ("routing/ledger.py", CORE),
    ("routing/metrics_board.py", CORE),
    ("routing/decisions.py", CORE),
    ("routing/inquiries.py", CORE),
    ("replica/lease_table.py", CORE),
    # text, which sees requests and nothing else of the engine
    ("text/tokenizer.py", TEXT),
    ("text/grammar_helper.py", TEXT),
    ("text/token_masks.py", TEXT),
    ("text/chat_template.py", TEXT),
    ("text/detokenizer.py", TEXT),
    ("text/stop_strings.py", TEXT),
    ("text/output_parser.py", TEXT),
    ("text/text_stream.py", TEXT),
    ("text/parsed_stream.py", TEXT),
    ("text/pooling_config.py", TEXT),
    ("text/json_schema.py", TEXT),
    ("text/grammar.py", TEXT),
    ("text/grammar_check.py", TEXT),
    ("text/reasoning_formats.py", TEXT),
    ("text/tool_reader.py", TEXT),
    ("text/json_tool_calls.py", TEXT),
    ("text/pythonic_tool_calls.py", TEXT),
    ("text/qwen3_coder_tool_calls.py", TEXT),
    ("text/tool_formats.py", TEXT),
    ("text/tool_grammars.py", TEXT),
    ("text/output_format.py", TEXT),
    # the device side, and the engine used from Python
    ("kernels/work_list.py", DEVICE),
    ("kernels/metadata.py", DEVICE),
    ("kernels/reference.py", DEVICE),
    ("kernels/simd.py", DEVICE),
    ("kernels/openmp.py", DEVICE),
    ("kernels/few_rows.py", DEVICE),
    ("kernels/linear.py", DEVICE),
    ("kernels/cpu.py", DEVICE),
    ("kernels/sampling_rows.py", DEVICE),
    ("kernels/sampling_cut.py", DEVICE),
    ("kernels/*.py", DEVICE),  # one file per Triton op; they may not import each other
    ("kernels/cuda_linear.py", DEVICE),
    ("kernels/cuda.py", DEVICE),
    ("kernels/ops.py", DEVICE),
    ("models/model.py", DEVICE),
    ("models/transformers_parts.py", DEVICE),
    ("models/transformers_config.py", DEVICE),
    ("models/decoder_config.py", DEVICE),
    ("models/rope.py", DEVICE),
    ("models/weights.py", DEVICE),
    ("models/decoder.py", DEVICE),
    ("models/transformers_model.py", DEVICE),
    ("runner/batch.py", DEVICE),
    ("runner/kv_cache.py", DEVICE),
    ("runner/random_numbers.py", DEVICE),
    ("runner/constraints.py", DEVICE),
    ("runner/sampler.py", DEVICE),
    ("runner/device_sampler.py", DEVICE),
    ("runner/cuda_graphs.py", DEVICE),
    ("runner/packed_batch.py", DEVICE),
    ("runner/gpu.py", DEVICE),
    ("runner/recompilation.py", DEVICE),
    ("runner/rehearsal.py", DEVICE),
    ("runner/pooler.py", DEVICE),
    ("runner/numerics.py", DEVICE),
    ("runner/machine.py", DEVICE),
    ("runner/device.py", DEVICE),
    ("runner/self_check.py", DEVICE),
    ("runner/cpu_device.py", DEVICE),
    ("runner/cuda_device.py", DEVICE),
    ("runner/model_runner.py", DEVICE),
    ("llm.py", OFFLINE),
    # the service
    ("config.py", SERVICE),
    ("fetch_model.py", ASSEMBLY),
    ("check_config.py", ASSEMBLY),
    ("metrics.py", SERVICE),
    ("api/error_response.py", SERVICE),
    ("api/json_body.py", SERVICE),
    ("api/request_model.py", SERVICE),
    ("api/headers.py", SERVICE),
    ("api/fields.py", SERVICE),
    ("api/names.py", SERVICE),
    ("api/prompts.py", SERVICE),
    ("api/tools.py", SERVICE),
    ("api/messages.py", SERVICE),
    ("api/response_format.py", SERVICE),
    ("api/protocol.py", SERVICE),
    ("api/embeddings.py", SERVICE),
    ("api/event_id.py", SERVICE),
    ("api/answer_formats.py", SERVICE),
    ("api/answers.py", SERVICE),
    ("api/responses_protocol.py", SERVICE),
    ("api/responses.py", SERVICE),
    ("api/reference.py", SERVICE),
    ("routing/router.py", SERVICE),
    ("routing/router_client.py", SERVICE),
    ("routing/ray_metrics.py", SERVICE),
    ("routing/ray_router.py", SERVICE),
    ("routing/replica_set.py", CORE),
    ("routing/departure.py", SERVICE),
    ("routing/targeted_router.py", SERVICE),
    ("replica/messages.py", SERVICE),
    ("replica/kept.py", SERVICE),
    ("replica/channel.py", SERVICE),
    ("replica/ray_transport.py", SERVICE),
    ("replica/request_history.py", REPLICA),
    ("replica/output_hub.py", REPLICA),
    ("replica/autoscaling.py", CORE),
    ("replica/load.py", REPLICA),
    ("replica/reporter.py", REPLICA),
    ("replica/replica.py", REPLICA),
    ("api/resume.py", SERVICE),
    ("api/draining.py", SERVICE),
    ("api/failover.py", SERVICE),
    ("api/ingress_counts.py", SERVICE),
    ("api/request_notes.py", SERVICE),
    ("api/explain.py", SERVICE),
    ("api/stream.py", SERVICE),
    ("api/generation.py", SERVICE),
    ("api/served_model.py", SERVICE),
    ("api/service.py", SERVICE),
    ("api/disconnect.py", SERVICE),
    ("api/live_feed.py", SERVICE),
    ("api/ui_routes.py", SERVICE),
    ("api/http_app.py", SERVICE),
    ("api/ingress.py", SERVICE),
    ("app.py", ASSEMBLY),
    ("local_ray.py", ASSEMBLY),
    ("serve_run.py", ASSEMBLY),
    ("launch.py", ALONE),
    ("chat.py", ALONE),
    ("demo_model/examples.py", DEMO_TEXT),
    ("demo_model/json_examples.py", DEMO_TEXT),
    ("demo_model/tool_examples.py", DEMO_TEXT),
    ("demo_model/train.py", DEMO),
)
"""The order in which files may import, earliest first. A name wins over a pattern, so kernels/ops.py comes after all
other kernels. Two files in one place (both matched by one pattern) may not import each other."""


def place_of(path: str) -> int | None:
    """The index in ORDER of a file, given relative to the package with forward slashes. None: it has no place."""
    names = [pattern for pattern, _ in ORDER]
    if path in names:
        return names.index(path)
    return next((place for place, pattern in enumerate(names) if "*" in pattern and fnmatchcase(path, pattern)), None)


def imported_modules(tree: ast.Module, package: list[str]) -> Iterator[tuple[int, str, list[str]]]:
    """All imports of a file, at any depth: (line, absolute module, names taken from it). ``package``: the file's own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, []
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield node.lineno, module, [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value), []


def project_files(root: Path, module: str, names: list[str]) -> list[str] | None:
    """The files of the package that ``from module import names`` means, relative to it. None: there is no such file."""

    def file_of(dotted: str) -> str | None:
        relative = "/".join(dotted.split(".")[1:])
        for candidate in (f"{relative}.py", f"{relative}/__init__.py".lstrip("/")):
            if (root / PACKAGE / candidate).is_file():
                return candidate
        return None

    found = [file_of(f"{module}.{name}") or file_of(module) for name in names] or [file_of(module)]
    return None if None in found else [path for path in found if path is not None]


def violations(root: Path) -> list[str]:
    """Every breach of the walls in ``root``/serve_app, one sentence each. Empty: the house stands."""
    found = []
    for file in sorted((root / PACKAGE).rglob("*.py")):
        path = file.relative_to(root / PACKAGE).as_posix()
        if not (file.parent / "__init__.py").is_file():
            found.append(f"{path} stands in a folder without an __init__.py")
        if file.name == "__init__.py":
            if file.read_text():
                found.append(f"{path} is not empty; package __init__ files import nothing and hold nothing")
            continue
        place = place_of(path)
        if place is None:
            found.append(
                f"{path} has no place in the order of imports: add it to ORDER in tests/test_layering.py, after every"
                " file it imports, before every file that imports it, with the room it belongs to"
            )
            continue
        tree = ast.parse(file.read_text(), filename=str(file))
        for line, module, names in imported_modules(tree, [PACKAGE, *path.split("/")[:-1]]):
            found += [f"{path}:{line} {what}" for what in breaches(root, place, module, names)]
    return found


def breaches(root: Path, place: int, module: str, names: list[str]) -> Iterator[str]:
    """What is wrong with one import by the file at ``place``."""
    pattern, room = ORDER[place]
    top = module.split(".")[0]
    if top != PACKAGE:
        if top not in sys.stdlib_module_names and top not in room.packages:
            allowed = ", ".join(sorted(room.packages)) or "no package"
            yield f"imports {module}; the {room.name} may use the standard library and {allowed}"
        return
    targets = project_files(root, module, names)
    if targets is None:
        yield f"imports {module}{names or ''}, which is no file of {PACKAGE}"
        return
    for target in targets:
        if target.endswith("__init__.py"):
            yield f"imports the package {module}, which is empty; name a file in it"
            continue
        its_place = place_of(target)
        if its_place is None:
            continue  # the target itself is reported
        if not any(fnmatchcase(target, allowed) for allowed in room.files):
            yield f"imports {target}; the {room.name} may import {', '.join(room.files) or 'no file of the project'}"
        elif its_place >= place:
            yield f"imports {target}, which comes after {pattern} in the order of imports (or shares its place)"


LOAD = """
import importlib, importlib.util, sys
sys.path.insert(0, sys.argv[1])
modules, may_lack, forbidden = (line.split() for line in sys.stdin.read().split("\\n"))
absent = [name for name in may_lack if importlib.util.find_spec(name) is None]
num_loaded = 0
for name in modules:
    try:
        importlib.import_module(name)
        num_loaded += 1
    except ModuleNotFoundError as error:
        if error.name not in absent:
            raise
print(num_loaded, *sorted(set(forbidden) & set(sys.modules)))
"""


def load(root: Path, rooms: set[str], forbidden: str, may_lack: str = "triton") -> tuple[int, list[str]]:
    """Imports every file of ``rooms`` in a fresh process. Returns (files loaded, forbidden packages that came along).

    A file that needs a package of ``may_lack`` is not counted where that is not installed: triton comes with the CUDA
    builds of torch only.
    """
    modules = []
    for file in sorted((root / PACKAGE).rglob("*.py")):
        place = place_of(file.relative_to(root / PACKAGE).as_posix())
        if place is not None and ORDER[place][1].name in rooms:
            modules.append(".".join(file.relative_to(root).with_suffix("").parts))
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(root)],
        input="\n".join([" ".join(modules), may_lack, forbidden]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    num_loaded, *came_along = done.stdout.split()
    return int(num_loaded), came_along


def test_the_walls_stand() -> None:
    assert violations(REPOSITORY) == []


def test_no_place_is_given_twice() -> None:
    patterns = [pattern for pattern, _ in ORDER]
    assert sorted(set(patterns)) == sorted(patterns)


def test_the_core_loads_neither_torch_nor_ray() -> None:
    num_loaded, came_along = load(REPOSITORY, {"core"}, "torch ray numba triton transformers")
    assert num_loaded >= 5
    assert came_along == []


def test_text_loads_neither_torch_nor_ray() -> None:
    _, came_along = load(REPOSITORY, {"core", "text"}, "torch ray numba triton transformers")
    assert came_along == []


def test_the_device_side_loads_neither_ray_nor_transformers() -> None:
    num_loaded, came_along = load(REPOSITORY, {"device", "offline"}, "ray fastapi starlette transformers")
    assert num_loaded >= 1
    assert came_along == []


INGRESS_AT_WORK = """
import sys
from serve_app.api import ingress, http_app
from serve_app.api.protocol import ChatCompletionRequest
from serve_app.api.served_model import load_served_model
from serve_app.config import ServeArgs

model = load_served_model(ServeArgs.parse({"model": {"model": sys.argv[1], "runner": "simulated"}}))
request = ChatCompletionRequest.parse(b'{"messages": [{"role": "user", "content": "hello there"}]}')
assert len(request.prompts(model.tokenizer, model.chat_template)[0].token_ids) > 3
print(*[name for name in ("torch", "numba", "triton", "transformers") if name in sys.modules])
"""


def test_an_ingress_that_has_made_a_prompt_has_loaded_no_torch(tmp_path: Path) -> None:
    from tests.tiny_models import make_tiny_model

    done = subprocess.run(
        [sys.executable, "-c", INGRESS_AT_WORK, str(make_tiny_model(tmp_path))],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


# Tests of the test: each plants one breach in a small house of its own, and expects exactly the sentence about it.

SOUND = {
    "__init__.py": "",
    "errors.py": "class RaggedServeError(Exception): ...\n",
    "engine/__init__.py": "",
    "engine/config.py": "from serve_app.errors import RaggedServeError\n",
    "engine/request.py": "import numpy as np\nfrom serve_app import errors\n",
    "engine/scheduler.py": "from .request import np\nfrom ..errors import RaggedServeError\nfrom . import config\n",
    "kernels/__init__.py": "",
    "kernels/metadata.py": "import torch\n",
    "kernels/softmax.py": "def f():\n    import triton.language as tl\n    from serve_app.kernels.metadata import torch\n",
    "kernels/ops.py": "import serve_app.kernels.softmax\n",
    "text/__init__.py": "",
    "text/tokenizer.py": "import tokenizers\nfrom serve_app.engine.request import errors\n",
    "llm.py": "from serve_app.text.tokenizer import tokenizers\nfrom serve_app.kernels import ops\n",
}


def build(root: Path, *planted: tuple[str, str]) -> Path:
    """Writes the sound house with the planted files instead of, or beside, its own."""
    for path, source in (SOUND | dict(planted)).items():
        file = root / PACKAGE / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    return root


def test_a_sound_house_passes(tmp_path: Path) -> None:
    assert violations(build(tmp_path)) == []


@pytest.mark.parametrize(
    ("path", "source", "sentence"),
    [
        ("engine/config.py", "import torch\n", "engine/config.py:1 imports torch; the core may use"),
        ("engine/config.py", "def f():\n    from ray import serve\n", "engine/config.py:2 imports ray; the core"),
        ("engine/config.py", "import importlib\nimportlib.import_module('torch.nn')\n", "config.py:2 imports torch.nn"),
        ("engine/config.py", "if 0:\n  __import__('numba')\n", "engine/config.py:2 imports numba"),
        ("kernels/ops.py", "import ray.serve as serve\n", "kernels/ops.py:1 imports ray.serve; the device may use"),
        ("text/tokenizer.py", "import torch\n", "text/tokenizer.py:1 imports torch; the text may use"),
        (
            "text/tokenizer.py",
            "from serve_app.engine import scheduler\n",
            "imports engine/scheduler.py; the text may import",
        ),
        ("text/tokenizer.py", "from serve_app import kernels\n", "imports the package serve_app, which is empty"),
        (
            "text/tokenizer.py",
            "from ..kernels.metadata import torch\n",
            "imports kernels/metadata.py; the text may import",
        ),
        (
            "errors.py",
            "from serve_app.engine import config\n",
            "errors.py:1 imports engine/config.py, which comes after",
        ),
        (
            "engine/request.py",
            "from .scheduler import config\n",
            "imports engine/scheduler.py, which comes after engine/req",
        ),
        (
            "engine/config.py",
            "from serve_app.llm import ops\n",
            "engine/config.py:1 imports llm.py; the core may import",
        ),
        (
            "kernels/norm.py",
            "from .softmax import f\n",
            "imports kernels/softmax.py, which comes after kernels/*.py in",
        ),
        ("kernels/softmax.py", "from . import ops\n", "kernels/softmax.py:1 imports kernels/ops.py, which comes after"),
        (
            "kernels/ops.py",
            "from serve_app.text import tokenizer\n",
            "imports text/tokenizer.py; the device may import",
        ),
        (
            "kernels/ops.py",
            "from serve_app.kernel import x\n",
            "imports serve_app.kernel['x'], which is no file of serve_app",
        ),
        ("engine/__init__.py", "from serve_app.errors import *\n", "engine/__init__.py is not empty"),
        ("engine/helper.py", "", "engine/helper.py has no place in the order of imports: add it to ORDER"),
        ("misc/helper.py", "", "misc/helper.py stands in a folder without an __init__.py"),
        ("chat.py", "from serve_app import errors\n", "chat.py:1 imports errors.py; the alone may import no file"),
    ],
)
def test_a_planted_breach_is_caught(tmp_path: Path, path: str, source: str, sentence: str) -> None:
    found = violations(build(tmp_path, (path, source)))
    assert any(sentence in violation for violation in found), found
    assert all(path in violation for violation in found), found


@pytest.mark.parametrize(("forbidden", "came_along"), [("ray torch", ["ray"]), ("torch", [])])
def test_a_load_that_ast_cannot_see_is_caught(tmp_path: Path, forbidden: str, came_along: list[str]) -> None:
    build(tmp_path, ("engine/config.py", "import importlib\nimportlib.import_module('r' + 'ay')\n"))
    (tmp_path / "ray.py").write_text("")
    assert load(tmp_path, {"core"}, forbidden) == (4, came_along)


def test_a_file_that_needs_an_absent_optional_package_is_not_counted(tmp_path: Path) -> None:
    build(tmp_path, ("engine/config.py", "import no_such_package_anywhere\n"))
    # The scheduler imports the config, so only errors and request are left.
    assert load(tmp_path, {"core"}, "", may_lack="no_such_package_anywhere") == (2, [])


def test_a_file_that_cannot_be_imported_is_an_error(tmp_path: Path) -> None:
    build(tmp_path, ("errors.py", "import no_such_package_anywhere\n"))
    with pytest.raises(AssertionError, match="no_such_package_anywhere"):
        load(tmp_path, {"core"}, "")
