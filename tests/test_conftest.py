"""The rules of tests/conftest.py, seen from outside: small test files run in a pytest of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def run_pytest(folder: Path, source: str, **environment: str) -> tuple[int, str]:
    """Runs ``source`` as a test file under the real conftest.py and pytest options. Returns (exit status, output)."""
    (folder / "tests").mkdir()
    (folder / "tests" / "test_planted.py").write_text(source)
    shutil.copy(TESTS / "conftest.py", folder / "tests")
    shutil.copy(TESTS.parent / "pyproject.toml", folder)
    base = {name: value for name, value in os.environ.items() if name != "RAGGED_SERVE_NO_SKIPS"}
    base["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"],
        cwd=folder,
        env=base | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


SKIPS = """
import pytest

def test_runs():
    pass

@pytest.mark.skipif(True, reason="no such thing here")
def test_by_mark():
    pass

def test_inside():
    pytest.skip("changed its mind")

@pytest.mark.may_skip("the kernel lacks it")
def test_documented():
    pytest.skip("the kernel lacks it")

@pytest.mark.may_skip("")
def test_without_a_reason():
    pytest.skip("no reason given in the mark")

@pytest.mark.xfail(reason="a known bug", strict=True)
def test_known_bug():
    raise AssertionError
"""


def test_skips_are_skips_by_default(tmp_path: Path) -> None:
    status, output = run_pytest(tmp_path, SKIPS)
    assert status == 0, output
    assert "1 passed, 4 skipped, 1 xfailed" in output


def test_under_no_skips_only_documented_skips_are_left(tmp_path: Path) -> None:
    status, output = run_pytest(tmp_path, SKIPS, RAGGED_SERVE_NO_SKIPS="1")
    assert status == 1, output
    # A skip by mark is met while the test is set up, which pytest counts as an error instead of a failure.
    assert "2 failed, 1 passed, 1 skipped, 1 xfailed, 1 error" in output
    assert "test_by_mark skipped (Skipped: no such thing here), and RAGGED_SERVE_NO_SKIPS is set" in output
    assert "test_inside skipped (Skipped: changed its mind)" in output


def test_under_no_skips_a_file_may_not_skip_itself(tmp_path: Path) -> None:
    source = "import pytest\npytest.importorskip('no_such_module_anywhere')\ndef test_never_seen():\n    pass\n"
    status, output = run_pytest(tmp_path, source, RAGGED_SERVE_NO_SKIPS="1")
    assert status != 0, output
    assert "skipped as a whole" in output


def test_a_warning_is_an_error(tmp_path: Path) -> None:
    source = "import warnings\ndef test_warns():\n    warnings.warn('mind the gap', stacklevel=1)\n"
    status, output = run_pytest(tmp_path, source)
    assert status == 1, output
    assert "mind the gap" in output


def test_an_unknown_mark_is_an_error(tmp_path: Path) -> None:
    status, output = run_pytest(tmp_path, "import pytest\n@pytest.mark.gpus\ndef test_typo():\n    pass\n")
    assert status != 0, output
    assert "'gpus' not found" in output


GPU = """
import pytest

@pytest.mark.gpu
def test_on_a_gpu():
    pass
"""

FAKE_TORCH = """
class cuda:
    is_available = staticmethod(lambda: {available})

def set_num_threads(num_threads):
    print("threads", num_threads)
"""


@pytest.mark.parametrize(("available", "ending"), [(False, "1 skipped"), (True, "1 passed")])
def test_gpu_tests_run_where_there_is_one(tmp_path: Path, available: bool, ending: str) -> None:
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "torch.py").write_text(FAKE_TORCH.format(available=available))
    status, output = run_pytest(tmp_path, GPU, RAGGED_SERVE_NO_SKIPS="1", PYTHONPATH=str(fake))
    assert status == 0, output
    assert ending in output
    assert available or "needs a CUDA device, and this machine has none" in output


def test_each_test_starts_with_one_torch_thread(tmp_path: Path) -> None:
    source = """
import torch

def test_first():
    assert torch.get_num_threads() == 1
    torch.set_num_threads(2)

def test_second():
    assert torch.get_num_threads() == 1
"""
    status, output = run_pytest(tmp_path, source)
    assert status == 0, output
    assert "2 passed" in output
