"""The check of deploy/*.yaml: ours are sound, and each planted mistake is told with its line, path, value and remedy."""

from __future__ import annotations

import ast
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

with warnings.catch_warnings():
    # Ray Serve 2.60's own schema gives pydantic's Field an argument of its first version, when it is first imported.
    warnings.filterwarnings("ignore", "Using extra keyword arguments on `Field`", DeprecationWarning)
    from ray.serve.schema import ServeDeploySchema

from serve_app import check_config
from serve_app.check_config import check, main
from serve_app.config import AUTOSCALING_POLICY, IMPORT_PATH, ROOTS, IngressUserConfig, ServeArgs, places_of
from serve_app.routing.ray_router import PLACE

DEPLOY = Path(__file__).parent.parent / "deploy"
FILES = sorted(DEPLOY.glob("config*.yaml"))
CONFIG = DEPLOY / "config.yaml"

R = "applications[0].deployments[1]"
I = "applications[0].deployments[0]"  # noqa: E741
A = "applications[0].args"


def test_the_files_are_there() -> None:
    kinds = ("", ".autoscale", ".cpu", ".gpu", ".gpu-cluster")
    assert {file.name for file in FILES} >= {f"config{kind}.yaml" for kind in kinds}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_ours_are_sound(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(file) == []
    assert main([str(file)]) == main(["--check", str(file)]) == 0  # app.py passes on what follows it
    assert capsys.readouterr().out == "ok\n" * 2


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_ours_set_what_serve_would_choose_badly(file: Path) -> None:
    for deployment in yaml.safe_load(file.read_text())["applications"][0]["deployments"]:
        assert deployment["max_ongoing_requests"] == 900
        assert deployment["health_check_period_s"] == 1
        assert deployment["graceful_shutdown_wait_loop_s"] < 1
        assert deployment["graceful_shutdown_timeout_s"] > 20
        assert deployment["ray_actor_options"]["num_cpus"] > 0


def test_the_autoscaling_file_differs_in_the_autoscaling_only() -> None:
    plain, scaled = (yaml.safe_load((DEPLOY / name).read_text()) for name in ("config.yaml", "config.autoscale.yaml"))
    assert plain["applications"][0]["deployments"][1].pop("num_replicas") == 2
    policy = scaled["applications"][0]["deployments"][1].pop("autoscaling_config")["policy"]
    assert policy == {"policy_function": AUTOSCALING_POLICY}
    assert plain == scaled


def test_the_cluster_file_differs_from_the_gpu_file_in_scale_and_place_only() -> None:
    one, many = (yaml.safe_load((DEPLOY / f"config.{name}.yaml").read_text()) for name in ("gpu", "gpu-cluster"))
    ingress, replica = many["applications"][0]["deployments"]
    assert ingress["num_replicas"] == 2
    ingress["num_replicas"] = 1
    assert ingress["ray_actor_options"].pop("label_selector") == PLACE, "the router's too"
    assert replica.pop("autoscaling_config")["policy"] == {"policy_function": AUTOSCALING_POLICY}
    replica["num_replicas"] = 1
    assert one == many


@pytest.mark.parametrize(
    ("name", "keys"),
    [("gpu", ["model:"]), ("gpu-cluster", ["model:", "max_replicas:"]), ("cpu", ["model:", "num_threads:"])],
)
def test_files_for_real_use_mark_what_to_edit(name: str, keys: list[str]) -> None:
    head, _, body = (DEPLOY / f"config.{name}.yaml").read_text().partition("\n\n")
    assert "marked EDIT, then\n#   serve" in head
    assert ("lines" if len(keys) > 1 else "line") + " marked" in head
    assert [line.split()[0] for line in body.splitlines() if "# EDIT" in line] == keys


def test_the_options_of_config_yaml_arrive() -> None:
    application = yaml.safe_load(CONFIG.read_text())["applications"][0]
    args = ServeArgs.parse(application["args"])
    assert (args.model.model, args.engine.num_threads, args.engine.kv_cache_memory_bytes) == ("demo", 1, 2**28)
    options = IngressUserConfig.parse(application["deployments"][0]["user_config"])
    assert (options.router.policy, options.router.max_queued_requests, options.limits.max_n) == ("expect", 256, 16)


MISTAKES = [
    # a key of Ray Serve that it would ignore
    ("http_options:\n", "http_option:\n", "http_option: that key is unknown; did you mean 'http_options'?"),
    ("  port: 8000", "  prot: 8000", "http_options.prot is 8000; that key is unknown; did you mean 'port'?"),
    (
        "    route_prefix: /",
        "    route: /",
        "applications[0].route is '/'; that key is unknown; did you mean 'route_",
    ),
    ("    args:\n", "    arg:\n", "applications[0].arg: that key is unknown; did you mean 'args'?"),
    (
        "        num_replicas: 2",
        "        num_replica: 2",
        f"{R}.num_replica is 2; that key is unknown; did you mean 'num_replicas'?",
    ),
    (
        "num_cpus: 0.25",
        "num_gpu: 1",
        f"{R}.ray_actor_options.num_gpu is 1; that key is unknown; did you mean 'num_gpus'?",
    ),
    (
        "        num_replicas: 2",
        "        num_replicas: 2\n        num_gpus: 1",
        f"{R}.num_gpus is 1; that key is unknown here; it belongs under applications[].deployments[].ray_actor_options",
    ),
    (
        "enable_access_log: false",
        "access_log: false",
        f"{R}.logging_config.access_log is False; that key is unknown; did you mean 'enable_access_log'?",
    ),
    (
        "retry_after_s: 1",
        "retry_after: 1",
        f"{I}.backpressure_config.retry_after is 1; that key is unknown; did you mean 'retry_after_s'?",
    ),
    # a value that Serve refuses, or cannot use
    ("port: 8000", "port: eight", "http_options.port is 'eight'; it must be a valid integer"),
    (
        "route_prefix: /",
        "route_prefix: v1",
        "applications[0].route_prefix is 'v1'; it must be '/', or begin with '/'",
    ),
    ("num_replicas: 2", "num_replicas: 0", f"{R}.num_replicas is 0; it must be greater than 0"),
    ("num_replicas: 2", "num_replicas: many", f'{R}: `num_replicas` must be an int or "auto", but got: many'),
    ("status_code: 429", "status_code: 418", f"{I}.backpressure_config.status_code is 418; it must be 503 or 429"),
    (
        "num_cpus: 0.25",
        "num_cpus: -1",
        f"{R}.ray_actor_options.num_cpus is -1; it must be greater than or equal to 0",
    ),
    ("applications:\n", "applications: []\nxs:\n", "applications is []; none has import_path: serve_app.app:build"),
    ("    deployments:\n", "    host: ::1\n    deployments:\n", 'Host "::1" is set in the config for application'),
    (
        "        ray_actor_options:\n          num_cpus: 0.1 ",
        "        ray_actor_options: 1 ",
        "it must be a mapping",
    ),
    ("    deployments:\n", "    deployments: {}\n    more:\n", "applications[0].deployments: it must be a list"),
    (
        "num_cpus: 0.1 ",
        "runtime_env: {env_vars: {THREADS: 1}} ",
        f"{I}.ray_actor_options.runtime_env.env_vars.THREADS is 1; a variable must be a text; put it in quotes",
    ),
    (
        "num_cpus: 0.1 ",
        "runtime_env: {env_var: {THREADS: '1'}} ",
        f"{I}.ray_actor_options.runtime_env.env_var: that key is unknown; did you mean 'env_vars'?",
    ),
    # autoscaling, which Serve's schema does not look into
    (
        "num_replicas: 2",
        "autoscaling_config: {min_replicas: 3, max_replicas: 2}",
        f"{R}.autoscaling_config: max_replicas (2) must be greater than or equal to min_replicas (3)!",
    ),
    (
        "num_replicas: 2",
        "num_replicas: 2\n        autoscaling_config: {max_replicas: 2}",
        f"{R}: Manually setting num_replicas is not allowed when autoscaling_config is provided.",
    ),
    (
        "num_replicas: 2",
        "autoscaling_config: {max_replica: 2}",
        f"{R}.autoscaling_config.max_replica is 2; that key is unknown; did you mean 'max_replicas'?",
    ),
    (
        "num_replicas: 2",
        "autoscaling_config: {upscale_delay_s: -1}",
        f"{R}.autoscaling_config.upscale_delay_s is -1; it must be greater than or equal to 0",
    ),
    (
        "num_replicas: 2",
        "autoscaling_config: {metrics_interval_s: 5, look_back_period_s: 5}",
        f"{R}.autoscaling_config.look_back_period_s is 5; 5 s; it must be above metrics_interval_s (5 s)",
    ),
    (
        "num_replicas: 2",
        "autoscaling_config: {policy: {policy_function: serve_app.replica.autoscaling:CommitedTokenPolicy}}",
        f"did you mean '{AUTOSCALING_POLICY}'?",
    ),
    (
        "num_replicas: 2",
        "autoscaling_config: {policy: {policy_function: mine.policy}}",
        f"{R}.autoscaling_config.policy.policy_function is 'mine.policy'; it must be module:name",
    ),
    # the application and its deployments
    ("import_path: serve_app.app:build", "other: 1", "applications[0].import_path is missing"),
    (
        "serve_app.app:build",
        "serve_app.app:biuld",
        "applications[0].import_path is 'serve_app.app:biuld'; did you mea",
    ),
    (
        "serve_app.app:build",
        "serve_ap.app:build",
        "applications[0].import_path is 'serve_ap.app:build'; did you mean",
    ),
    (
        "import_path: serve_app.app:build",
        "import_path: theirs:app",
        "applications: none has import_path: serve_app.a",
    ),
    (
        "name: Replica",
        "name: Replicas",
        f"{R}.name is 'Replicas'; there is no such deployment; did you mean 'Replica'?",
    ),
    ("name: Replica", "name: Engine", "there is no such deployment; the deployments are Ingress and Replica"),
    ("name: Replica", "name: Ingress", f"{R}.name is 'Ingress'; that deployment stands twice"),
    (
        "max_ongoing_requests: 900\n",
        "max_ongoing_requests: 901\n",
        f"{R}.max_ongoing_requests is 901; it must be at most 900, or health checks queue behind streams",
    ),
    (
        "        max_ongoing_requests: 900\n",
        "",
        f"{R}.max_ongoing_requests is missing: Ray Serve's default is 5; set it",
    ),
    (
        "num_replicas: 2",
        "request_router_config: {initial_backoff_s: 1}",
        f"{R}.request_router_config: it must not be set: the application brings its own router",
    ),
    (
        "num_replicas: 2",
        "user_config: {log_level: INFO}",
        f"{R}.user_config: the Replica takes none; what may change",
    ),
    (
        "num_cpus: 0.25",
        "num_gpus: 2",
        f"{R}.ray_actor_options.num_gpus is 2; it must be at most 1: one replica is one",
    ),
    (
        "num_cpus: 0.1 ",
        "num_gpus: 1 ",
        f"{I}.ray_actor_options.num_gpus is 1; it must be 0: the Ingress uses no GPU",
    ),
    (
        "model: demo",
        "device: cuda",
        f"{R}.ray_actor_options.num_gpus must be 1, for args.model.device is 'cuda': Ray hides the GPUs",
    ),
    (
        "num_cpus: 0.25",
        'label_selector: {zone: "!in(a, b)"}',
        f"{R}.ray_actor_options.label_selector.zone is '!in(a, b)'; it must have no space: Ray takes that for a part",
    ),
    # the drain
    (
        "graceful_shutdown_timeout_s: 60 # above args.drain.replica_seconds",
        "graceful_shutdown_timeout_s: 34 #",
        f"{R}.graceful_shutdown_timeout_s is 34; it must be at least 35: args.drain.replica_seconds is 30, and what is left",
    ),
    (
        "graceful_shutdown_timeout_s: 60 # above args.drain.ingress_seconds",
        "graceful_shutdown_timeout_s: 54.5 #",
        f"{I}.graceful_shutdown_timeout_s is 54.5; it must be at least 55: args.drain.ingress_seconds is 50, and what",
    ),
    (
        "      api:\n",
        "      drain:\n        replica_seconds: 56\n      api:\n",
        f"{R}.graceful_shutdown_timeout_s is 60; it must be at least 61: args.drain.replica_seconds is 56",
    ),
    # our own options
    (
        "num_threads: 1",
        "num_thread: 1",
        f"{A}.engine.num_thread is 1; that key is unknown; did you mean 'num_threads'?",
    ),
    ("num_threads: 1", "num_threads: 0", f"{A}.engine.num_threads is 0; it must be greater than or equal to 1"),
    (
        "num_threads: 1",
        "max_num_seqs: 600",
        f"{A}.engine: max_num_seqs is 600; it must be at most max_num_batched_tok",
    ),
    ("num_threads: 1", "num_gpus: 1", "it belongs under applications[].deployments[].ray_actor_options"),
    (
        "num_threads: 1",
        "policy: expect",
        "is unknown here; it belongs under applications[].deployments[].autoscaling_",
    ),
    (
        "model: demo",
        "model: demo\n        dtyp: auto",
        f"{A}.model.dtyp is 'auto'; that key is unknown; did you mean 'dty",
    ),
    (
        "model: demo",
        "dtype: bf16",
        f"{A}.model.dtype is 'bf16'; it must be 'auto', 'float32', 'bfloat16' or 'float16'",
    ),
    (
        "model: demo",
        "revision: 2024-01-01",
        "the file must be plain data as in JSON: Object of type date is not JSON",
    ),
    (
        "default_chat_max_tokens: 256",
        "default_chat_max_tokens: 1e3",
        f"{A}.api.default_chat_max_tokens is '1e3'; it mu",
    ),
    (
        "policy: expect",
        "policy: expected",
        f"{I}.user_config.router.policy is 'expected'; it must be 'reserve' or 'e",
    ),
    (
        "policy: expect",
        "block_size: 16",
        f"{I}.user_config.router.block_size is 16; that key is unknown here; it bel",
    ),
    (
        "log_level: INFO",
        "log_levl: INFO",
        f"{I}.user_config.log_levl is 'INFO'; that key is unknown; did you mean 'lo",
    ),
    (
        "max_queued_requests: 256",
        "max_queued_requests: 900",
        "900 may wait; it must be below the Ingress's max_ongoing_re",
    ),
    ("max_n: 16", "max_n: 1000", f"{I}.user_config.limits.max_n is 1000; it must be less than or equal to 128"),
    # the file itself
    ("  port: 8000", "  host: 0.0.0.0", "http_options.host is '0.0.0.0'; that key stands twice, first in line 9"),
    ("  port: 8000", " port: 8000", "no valid YAML: expected <block end>, but found '<block mapping start>'"),
    ("  port: 8000", "  port: [8000", "no valid YAML: "),
    ("  port: 8000", "  8000: port", "http_options.8000 that key is unknown; known here: host, port"),
]


@pytest.mark.parametrize(("before", "after", "sentence"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_is_told(
    before: str, after: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = CONFIG.read_text()
    assert before in text
    place = text.rindex(before)
    file = tmp_path / "bad.yaml"
    file.write_text(text[:place] + after + text[place + len(before) :])
    problems = check(file)
    found = [problem for problem in problems if sentence in problem]
    assert found, problems
    assert all(problem.startswith(f"{file}:") for problem in problems)
    key = found[0].split(": ", 1)[1].split()[0].rstrip(":").split(".")[-1]
    if f"{key}:" in after:  # else it is about a group above the planted line
        first = text[:place].count("\n") + 1
        assert first <= int(found[0].split(":")[1]) <= first + after.count("\n"), problems
    assert main([str(file)]) == 1
    assert capsys.readouterr().out.splitlines() == problems


def told(tmp_path: Path, *changes: tuple[str, str]) -> list[str]:
    """What is said of config.yaml with texts replaced."""
    text = CONFIG.read_text()
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    file = tmp_path / "changed.yaml"
    file.write_text(text)
    return [problem.split(": ", 1)[1] for problem in check(file)]


def test_a_drain_fits_into_what_serve_grants_unasked(tmp_path: Path) -> None:
    unset = ("        graceful_shutdown_timeout_s: 60", "        #")
    longer = ("    args:\n", "    args:\n      drain: {replica_seconds: 55, ingress_seconds: 56}\n")
    assert told(tmp_path, unset) == []
    reason = "the Ingress's graceful_shutdown_timeout_s is not set, which means 60"
    assert told(tmp_path, unset, longer) == [f"{A}.drain.ingress_seconds is 56; it must be at most 55: {reason}"]


def test_haproxy_waits_longer_than_an_ingress_drains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    longer = ("graceful_shutdown_timeout_s: 60", "graceful_shutdown_timeout_s: 600")
    drain = ("    args:\n", "    args:\n      drain: {ingress_seconds: 116}\n")
    monkeypatch.delenv("RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S", raising=False)
    monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)
    assert told(tmp_path, longer, drain) == []
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    assert told(tmp_path) == []
    reason = (
        "HAProxy cuts streams 120 s after each change of the ingresses; set RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S higher"
    )
    assert told(tmp_path, longer, drain) == [f"{A}.drain.ingress_seconds is 116; it must be at most 115: {reason}"]
    monkeypatch.setenv("RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S", "121")
    assert told(tmp_path, longer, drain) == []
    monkeypatch.setenv("RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S", "54")
    assert "ingress_seconds is 50 by default; it must be at most 49: HAProxy cuts" in told(tmp_path)[0]


def test_there_are_enough_mistakes() -> None:
    assert len(MISTAKES) >= 50


def test_all_mistakes_are_told_in_the_order_of_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    text = CONFIG.read_text().replace("num_threads: 1", "num_thread: 1").replace("  port:", "  prot:")
    file.write_text(text.replace("log_level: INFO", "log_level: LOUD"))
    lines = file.read_text().splitlines()
    told = [lines[int(problem.split(":")[1]) - 1].strip() for problem in check(file)]
    assert [line.split(" #")[0] for line in told] == ["prot: 8000", "num_thread: 1", "log_level: LOUD"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "the file holds None; it must be a mapping with applications:"),
        ("- 1\n", "the file holds [1]; it must be a mapping"),
        ("http_options: {}\n", "applications is missing"),
        ("applications:\n", "applications is None; it must be a valid list"),
        ("applications: [null]\n", "applications[0] is None; it must be a mapping"),
        ("applications: [serve_app]\n", "applications[0] is 'serve_app'; it must be a mapping"),
        (
            "applications: [{import_path: serve_app.app:build, args: [1]}]\n",
            "args is [1]; it must be a valid dictionary",
        ),
        (
            "applications: [{import_path: serve_app.app:build, deployments: [{name: Ingress, user_config: x}]}]\n",
            "user_config is 'x'; it must be a valid dictionary",
        ),
        ("applications: [{import_path: serve_app.app:build, deployments: [Ingress]}]\n", "it must be a mapping"),
        ("applications: &all [{import_path: serve_app.app:build, args: *all}]\n", "Circular reference"),
        ("a: " + "[" * 5000 + "]" * 5000, "it is nested too deeply"),
        ("a: !!python/object:os.system {}\n", "could not determine a constructor"),
        ("a: *nowhere\n", "found undefined alias"),
    ],
)
def test_a_file_that_is_no_configuration(text: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    problems = check(file)
    assert any(sentence in problem for problem in problems), problems


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert "cannot be read: [Errno 2]" in check(tmp_path / "absent.yaml")[0]
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xff")
    assert "cannot be read: 'utf-8' codec" in check(tmp_path / "bytes.yaml")[0]


def test_a_short_file_is_sound(tmp_path: Path) -> None:
    """What is not said comes from the code: no deployments, headings with nothing below, a model by its name alone."""
    file = tmp_path / "short.yaml"
    file.write_text("applications:\n- import_path: serve_app.app:build\n  args:\n    model: /models/x\n    engine:\n")
    assert check(file) == []


def test_another_application_beside_ours_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "two.yaml"
    text = (
        CONFIG.read_text()
        + "  - {name: theirs, import_path: 'theirs:app', route_prefix: /theirs, args: {anything: 1}}\n"
    )
    file.write_text(text)
    assert check(file) == []
    file.write_text(text.replace("route_prefix: /theirs", "route_prefx: /theirs"))
    assert len(check(file)) == 2  # the key, and the route that both then have


def test_serve_itself_takes_our_files_and_most_of_the_mistakes() -> None:
    """Why the check exists: a misspelt num_gpus passes Ray Serve's own schema."""
    data = yaml.safe_load(CONFIG.read_text())
    data["applications"][0]["deployments"][1]["ray_actor_options"]["num_gpu"] = 1
    assert ServeDeploySchema.model_validate(data).applications[0].deployments[1].ray_actor_options.num_gpus is None


def test_the_check_starts_no_ray_and_loads_no_torch() -> None:
    code = (
        "import sys; from serve_app.check_config import main; code = main(sys.argv[1:]); import ray;"
        " print(code, ray.is_initialized(), 'torch' in sys.modules)"
    )
    files = [str(file) for file in FILES]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["ok", "0 False False"]


def test_the_command_line_wants_something_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "name a file, or --reference" in capsys.readouterr().err


def test_the_reference_names_every_option_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--reference"]) == 0
    text = capsys.readouterr().out
    groups = {"args", "user_config"}
    for root, model in ROOTS:
        for key, place in places_of(model, root):
            rows = [
                line for line in text.split(f"#### `{place}`\n")[1].split("####")[0].splitlines() if line[:3] == "| `"
            ]
            found = [row for row in rows if row.startswith(f"| `{key}` |")]
            if f"#### `{place}.{key}`" in text:
                groups.add(f"{place}.{key}")
                assert found == []
            else:
                assert len(found) == 1
                assert all(cell.strip() for cell in found[0].strip("|").replace("\\|", "").split("|"))
    assert text.count("#### ") == len(groups) == 12
    assert "| `seed` | integer >= 0, <= 18446744073709551615 | `0` | Seeds dummy weights," in text
    assert '| `policy` | `reserve` or `expect` | `"expect"` | What a request books. reserve:' in text


@pytest.mark.parametrize("target", [IMPORT_PATH, AUTOSCALING_POLICY])
def test_the_names_in_the_files_lead_somewhere(target: str) -> None:
    module, name = target.split(":")
    file = Path(check_config.__file__).parent.parent / Path(*module.split(".")).with_suffix(".py")
    names = [getattr(node, "name", None) for node in ast.parse(file.read_text()).body]
    assert name in names
