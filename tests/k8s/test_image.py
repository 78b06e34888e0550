"""k8s/Dockerfile, read and not built: its versions are the project's, what it copies is there, and nobody in it is root."""

from __future__ import annotations

import fnmatch
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from serve_app.config import IMPORT_PATH
from tests.k8s import checks
from tests.k8s.harness import K8S, REPOSITORY, Manifests, load, read_base

WORKDIR = "/home/ray/ragged-serve"


@dataclass(frozen=True)
class Instruction:
    """One of a Dockerfile. A line that ends with a backslash goes on."""

    name: str
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)


def instructions(text: str) -> list[Instruction]:
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", "")
    return [Instruction(*line.split(None, 1)) for line in joined.splitlines()]


DOCKERFILE = instructions((K8S / "Dockerfile").read_text())


def of(name: str) -> list[Instruction]:
    return [one for one in DOCKERFILE if one.name == name]


def argument(name: str) -> str:
    (found,) = (one.text.partition("=")[2] for one in of("ARG") if one.text.startswith(f"{name}="))
    return found


def copies() -> list[tuple[list[str], str]]:
    """(sources, target) of each COPY."""
    words = [[word for word in one.words if not word.startswith("--")] for one in of("COPY")]
    return [(one[:-1], one[-1]) for one in words]


def runs(part: str) -> list[str]:
    return [one.text for one in of("RUN") if part in one.text]


def test_its_ray_is_the_projects() -> None:
    image, _, tag = argument("BASE_IMAGE").partition(":")
    ray, python, cuda = tag.split("-")
    assert image == "rayproject/ray"
    assert ray == checks.constraint("ray")
    least = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["requires-python"]
    major, minor = re.fullmatch(r"py(\d)(\d+)", python).groups()  # type: ignore[union-attr]
    assert (int(major), int(minor)) >= tuple(int(part) for part in least.removeprefix(">=").split("."))
    assert of("FROM")[0].text == "${BASE_IMAGE}"
    assert cuda == "cu130"


def test_torch_is_of_the_images_cuda() -> None:
    cuda = argument("BASE_IMAGE").rpartition("-")[2]
    assert argument("TORCH_INDEX") == f"https://download.pytorch.org/whl/{cuda}"
    (torch, rest) = runs("pip install")
    assert "--no-deps" in torch, "the index has nothing but torch that should come from it"
    assert "--index-url ${TORCH_INDEX} torch" in torch
    assert "index-url" not in rest, "all else comes from the ordinary index; torch is there already"
    assert checks.constraint("torch").count(".") == 2
    assert "+" not in checks.constraint("torch"), "the pin fits the CPU's build and CUDA's"


def test_manifests_ask_for_the_image_that_is_built() -> None:
    head = (K8S / "Dockerfile").read_text().partition("\nARG")[0]
    tags = re.findall(r"-t ragged-serve:(\S+)", head)
    assert tags == [f"{checks.project_version()}-ray{checks.constraint('ray')}-{kind}" for kind in ("cu130", "cpu")]
    assert read_base().pod("replica").main["image"] == f"ragged-serve:{tags[0]}"
    dev = yaml.safe_load((K8S / "overlays" / "dev" / "kustomization.yaml").read_text())
    assert dev["images"] == [{"name": "ragged-serve", "newTag": tags[1]}]


def test_all_that_is_installed_is_pinned() -> None:
    for command in runs("pip install"):
        assert "--constraint constraints.txt" in command
        assert "--no-cache-dir" in command


def test_the_list_of_dependencies_is_the_projects(tmp_path: Path) -> None:
    (command,) = runs("requirements.txt")
    made = shlex.split(command.partition(" > requirements.txt")[0])
    assert made[0] == "python"
    done = subprocess.run([sys.executable, *made[1:]], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert done.stdout.splitlines() == [*project["dependencies"], *extras["transformers"], *extras["load"]]


def test_what_it_copies_is_there() -> None:
    for sources, target in copies():
        for source in sources:
            assert (REPOSITORY / source).exists(), source
            assert target in ("./", source), "everything has its place below WORKDIR"


def allowed(path: str) -> bool:
    """By .dockerignore; the last pattern that fits decides."""
    keeps = True
    for line in (REPOSITORY / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        if line and not line.startswith("#") and any(fnmatch.fnmatch(part, pattern) for part in parts(path, line)):
            keeps = line.startswith("!")
    return keeps


def parts(path: str, pattern: str) -> list[str]:
    """What a pattern is held against: the first part of the path, or with ** each of them."""
    return path.split("/") if "**" in pattern else path.split("/")[:1]


@pytest.mark.parametrize(
    ("path", "goes"),
    [
        ("serve_app/app.py", True),
        ("deploy/config.yaml", True),
        ("serve_app/__pycache__/app.pyc", False),
        (".git/config", False),
        (".venv/bin/python", False),
        (".env", False),
        ("tests/conftest.py", False),
    ],
)
def test_what_goes_into_the_build(path: str, goes: bool) -> None:
    assert allowed(path) is goes


def test_copied_files_go_into_the_build() -> None:
    assert all(allowed(source) for sources, _ in copies() for source in sources)


def test_nobody_is_root_and_the_pods_user_is_the_images() -> None:
    users = [one.text for one in of("USER")]
    assert users[-1] == "1000"
    at_user = max(place for place, one in enumerate(DOCKERFILE) if one.name == "USER")
    assert all(place > at_user for place, one in enumerate(DOCKERFILE) if one.name in ("COPY", "WORKDIR"))
    context = read_base().pod("replica").spec["securityContext"]
    assert all(f"--chown={context['runAsUser']}:{context['runAsGroup']}" in one.text for one in of("COPY"))


def test_it_has_what_probes_and_triton_call() -> None:
    (command,) = runs("apt-get install")
    assert {"bash", "wget", "gcc"} <= set(command.split())


def test_import_path_is_found_from_workdir() -> None:
    assert [one.text for one in of("WORKDIR")] == [WORKDIR]
    assert f"PYTHONPATH={WORKDIR}" in [one.text for one in of("ENV")]
    folders = {target for _, target in copies()}
    assert IMPORT_PATH.partition(".")[0] in folders
    load_test = [one for file in sorted((K8S / "load").glob("*.yaml")) for one in load(file.read_text())]
    manifests = Manifests([*read_base().documents, *(one for one in load_test if "metadata" in one)])
    jobs = [pod for pod in manifests.pods() if not pod.is_ray]
    assert jobs
    for pod in jobs:
        words = [word for word in pod.main["command"] if word.startswith(("serve_app.", "loadtests/"))]
        assert len(words) == 1, pod.main["command"]
        file = words[0] if "/" in words[0] else words[0].replace(".", "/") + ".py"
        assert (REPOSITORY / file).is_file()
        assert file.partition("/")[0] in folders


def test_no_secret_is_in_it() -> None:
    for one in DOCKERFILE:
        assert one.name != "ADD"
        assert not re.search(r"TOKEN|PASSWORD|SECRET|API_KEY", one.text), one.text
    assert not any("." in sources for sources, _ in copies()), "nothing is copied that is not named"
