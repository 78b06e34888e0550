"""Checks a deploy/*.yaml without a cluster, and prints the reference of what it may say.

    python -m serve_app.check_config deploy/config.yaml     "ok", or one problem a line and exit code 1
    python -m serve_app.check_config --reference            the options as tables, in markdown

Ray Serve ignores misspelt keys outside ``args``, takes missing limits for its own defaults, and reports most other
mistakes only in the status of a cluster. So the whole file is walked here: against Ray Serve's pydantic schemas, against
serve_app/config.py, and against what this server needs of Serve. Imports Ray, and starts nothing.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml  # type: ignore[import-untyped]
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from ray.runtime_env import RuntimeEnv
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from serve_app.config import (
    AUTOSCALING_POLICY,
    DEPLOYMENTS,
    DRAIN_MARGIN_SECONDS,
    GRACEFUL_SHUTDOWN_SECONDS,
    IMPORT_PATH,
    INGRESS,
    MAX_ONGOING_REQUESTS,
    REPLICA,
    ROOTS,
    DrainArgs,
    IngressUserConfig,
    KeyPath,
    RouterOptions,
    ServeArgs,
    about,
    holds_list,
    models_in,
    places_of,
    sentences,
    unknown_key,
)

HA_PROXY = "RAY_SERVE_ENABLE_HA_PROXY"
HARD_STOP = "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"
HARD_STOP_SECONDS = 120.0
"""Ray Serve's default of that variable (serve/_private/constants.py, Ray 2.60)."""
NO_MAPPING = "it must be a mapping"
NO_LIST = "it must be a list"


def check(path: str | Path) -> list[str]:
    """Every problem of the file, one sentence each: file, line, key path, value, and what it should be."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return [f"{path}: cannot be read: {error}"]
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        twice = list(_duplicates(root))
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else f"{path}"
        return [f"{where}: no valid YAML: {getattr(error, 'problem', None) or error}"]
    except RecursionError:
        return [f"{path}: no valid configuration: it is nested too deeply"]
    problems = [(place, sentence) for place, sentence in twice]
    try:
        json.dumps(data)
    except (TypeError, ValueError) as error:
        problems.append(((), f"the file must be plain data as in JSON: {error}"))
    else:
        problems += _problems(data)
    lines = sorted((_line_of(root, place), about(place, sentence, data)) for place, sentence in dict.fromkeys(problems))
    return [f"{path}:{line}: {sentence}" for line, sentence in lines]


# ---- the file ------------------------------------------------------------------------------------------------------


def _duplicates(node: yaml.Node | None, at: KeyPath = (), above: tuple[int, ...] = ()) -> Iterator[tuple[KeyPath, str]]:
    """PyYAML silently keeps the last of two equal keys."""
    if node is None or id(node) in above:
        return
    above = (*above, id(node))
    if isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            name = str(key.value)
            if name in first:
                yield (*at, name), f"that key stands twice, first in line {first[name]}"
            first.setdefault(name, key.start_mark.line + 1)
            yield from _duplicates(value, (*at, name), above)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _duplicates(value, (*at, index), above)


def _line_of(node: yaml.Node | None, path: KeyPath) -> int:
    """The line of a key, or of the nearest one above it that is in the file. The last of two equal keys counts."""
    line = 1
    for part in path:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if str(key.value) == part]
            if not found:
                break
            line, node = found[-1][0].start_mark.line + 1, found[-1][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line


# ---- Ray Serve's part ----------------------------------------------------------------------------------------------


def _problems(data: Any) -> Iterator[tuple[KeyPath, str]]:
    if not isinstance(data, dict):
        yield (), f"the file holds {data!r:.60}; it must be a mapping with applications:"
        return
    places = _places()
    walked = list(_walk(data, ServeDeploySchema, (), places))
    yield from walked
    if any(sentence in (NO_MAPPING, NO_LIST) for _, sentence in walked):
        return  # not of the shape that everything below relies on
    yield from _refused_by_serve(data)
    applications = data.get("applications") or []
    ours = [i for i, application in enumerate(applications) if _is_ours(application.get("import_path"))]
    if not ours:
        yield ("applications",), f"none has import_path: {IMPORT_PATH}, so none is this server"
    for index, application in enumerate(applications):
        at: KeyPath = ("applications", index)
        yield from _runtime_env(application.get("runtime_env"), (*at, "runtime_env"))
        for number, deployment in enumerate(application.get("deployments") or []):
            below: KeyPath = (*at, "deployments", number)
            options = deployment.get("ray_actor_options") or {}
            yield from _runtime_env(options.get("runtime_env"), (*below, "ray_actor_options", "runtime_env"))
            yield from _autoscaling(deployment.get("autoscaling_config"), (*below, "autoscaling_config"))
        if index in ours:
            yield from _application(application, at, places)


def _places() -> dict[str, list[str]]:
    """Every known key of the file -> the groups it may stand in."""
    places: dict[str, list[str]] = {}
    for key, place in places_of(ServeDeploySchema, ""):
        if key not in ("host", "port") or "applications" not in place:  # there only for files of another form
            places.setdefault(key, []).append(place.lstrip(".") or "the top level")
    for root, model in ROOTS:
        for key, place in places_of(model, root):
            places.setdefault(key, []).append(place)
    return places


def _walk(
    value: Any, model: type[BaseModel], at: KeyPath, places: Mapping[str, list[str]]
) -> Iterator[tuple[KeyPath, str]]:
    """Unknown keys, and groups that are no mappings, in and below ``value``, which should look like ``model``."""
    if not isinstance(value, dict):
        yield at, NO_MAPPING
        return
    for key, inside in value.items():
        field = model.model_fields.get(key) if isinstance(key, str) else None
        if field is None:
            yield (*at, str(key)), unknown_key(str(key), model.model_fields, places)
            continue
        inner = next(models_in(field.annotation), None)
        if inner is None or inside is None or _is_shorthand(inside, field):
            continue
        if not holds_list(field.annotation):
            yield from _walk(inside, inner, (*at, key), places)
        elif not isinstance(inside, list):
            yield (*at, key), NO_LIST
        else:
            for index, item in enumerate(inside):
                yield from _walk(item, inner, (*at, key, index), places)


def _is_shorthand(value: Any, field: FieldInfo) -> bool:
    """``model: x``, the one group of ours that a text may stand for."""
    return isinstance(value, str) and field is ServeArgs.model_fields["model"]


def _refused_by_serve(data: dict[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """What Serve's own validators say. On a copy, for some write into what they check.

    Left out is what Serve would import: a policy, a router and an actor's class need not be on this machine.
    """
    data = copy.deepcopy(data)
    for application in data.get("applications") or []:
        for deployment in application.get("deployments") or []:
            for key in ("request_router_config", "deployment_actors"):
                deployment.pop(key, None)
            if isinstance(deployment.get("autoscaling_config"), dict):
                deployment["autoscaling_config"].pop("policy", None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # _autoscaling goes into what they would be about
            ServeDeploySchema.model_validate(copy.deepcopy(data))
    except ValidationError as error:
        for place, sentence in sentences(error, data):
            if "Extra inputs are not permitted" not in sentence:  # _walk has said so already, and better
                yield place, sentence
    except Exception as error:  # a validator of Serve that did not expect this: the sentence is all there is
        yield (), f"Ray Serve refuses the file: {error}"


def _autoscaling(value: Any, at: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    """Serve's schema takes any mapping here, and looks into it only when it deploys."""
    if not isinstance(value, dict):
        return
    policy = value.get("policy")
    if isinstance(policy, dict):
        function = policy.get("policy_function")
        if not isinstance(function, str) or function.count(":") != 1:
            yield (*at, "policy", "policy_function"), "it must be module:name"
        elif function != AUTOSCALING_POLICY and _is_near(function, AUTOSCALING_POLICY):
            yield (*at, "policy", "policy_function"), f"did you mean {AUTOSCALING_POLICY!r}?"
    numbers = {key: item for key, item in value.items() if key != "policy" and key in AutoscalingConfig.model_fields}
    with warnings.catch_warnings():
        # metrics_interval_s is called deprecated, and is what Serve 2.60 goes by. The look-back is checked below.
        warnings.simplefilter("ignore")
        try:
            config = AutoscalingConfig.model_validate(numbers)
        except ValidationError as error:
            for place, sentence in sentences(error, value):
                yield (*at, *place), sentence
            return
        except ValueError as error:  # its enums raise it bare
            yield at, str(error)
            return
    if config.look_back_period_s <= config.metrics_interval_s:
        look_back, interval = config.look_back_period_s, config.metrics_interval_s
        yield (*at, "look_back_period_s"), f"{look_back:g} s; it must be above metrics_interval_s ({interval:g} s)"


def _runtime_env(value: Any, at: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    if not isinstance(value, dict):
        return
    known = sorted(RuntimeEnv.known_fields)
    for key in value:
        if key not in known:
            yield (*at, str(key)), unknown_key(str(key), known, {})
    variables = value.get("env_vars") or {}
    if not isinstance(variables, dict):
        yield (*at, "env_vars"), "it must be a mapping of texts"
        return
    for name, text in variables.items():
        if not isinstance(text, str):
            yield (*at, "env_vars", name), "a variable must be a text; put it in quotes"


# ---- our part ------------------------------------------------------------------------------------------------------


def _is_near(text: str, known: str) -> bool:
    return difflib.SequenceMatcher(None, text, known).ratio() > 0.75


def _is_ours(import_path: Any) -> bool:
    """Ours, or meant to be."""
    return isinstance(import_path, str) and (import_path.startswith("serve_app.") or _is_near(import_path, IMPORT_PATH))


def _application(
    application: dict[str, Any], at: KeyPath, places: Mapping[str, list[str]]
) -> Iterator[tuple[KeyPath, str]]:
    if application["import_path"] not in (IMPORT_PATH, IMPORT_PATH.replace(":", ".")):
        yield (*at, "import_path"), f"did you mean {IMPORT_PATH!r}?"
    prefix = application.get("route_prefix")
    if isinstance(prefix, str) and (
        prefix[:1] != "/" or set("{}") & set(prefix) or (prefix != "/" and prefix[-1] == "/")
    ):
        yield (*at, "route_prefix"), "it must be '/', or begin with '/', not end with it, and have no braces"
    args = application.get("args") or {}
    if not isinstance(args, dict):
        return  # Serve has said so
    yield from _options(args, ServeArgs, (*at, "args"), places)
    deployments = application.get("deployments") or []
    seen: set[str] = set()
    for number, deployment in enumerate(deployments):
        name = deployment.get("name")
        below: KeyPath = (*at, "deployments", number)
        if name not in DEPLOYMENTS:
            near = difflib.get_close_matches(str(name), DEPLOYMENTS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"the deployments are {' and '.join(DEPLOYMENTS)}"
            yield (*below, "name"), f"there is no such deployment; {hint}"
        elif name in seen:
            yield (*below, "name"), "that deployment stands twice"
        else:
            seen.add(name)
        yield from _deployment(deployment, below)
        if name == REPLICA:
            yield from _replica(deployment, args, below)
        if name == INGRESS:
            yield from _ingress(deployment, below, places)
    yield from _drain(args.get("drain"), deployments, at, os.environ)


def _drain(
    value: Any, deployments: Sequence[Mapping[str, Any]], at: KeyPath, environ: Mapping[str, str]
) -> Iterator[tuple[KeyPath, str]]:
    """Whoever waits for a drain must wait longer than it lasts: Ray Serve before it kills, HAProxy before it cuts."""
    try:
        drain = DrainArgs.model_validate({} if value is None else value)
    except ValidationError:
        return  # said by `_options`
    numbers = {deployment.get("name"): i for i, deployment in enumerate(deployments)}

    def too_long(key: str, limit: float, reason: str) -> tuple[KeyPath, str]:
        unsaid = "" if key in drain.model_fields_set else f"is {getattr(drain, key):g} by default; "
        return (*at, "args", "drain", key), f"{unsaid}it must be at most {limit:g}: {reason}"

    for name, key in ((REPLICA, "replica_seconds"), (INGRESS, "ingress_seconds")):
        seconds = getattr(drain, key)
        number = numbers.get(name)
        given = None if number is None else deployments[number].get("graceful_shutdown_timeout_s")
        limit = GRACEFUL_SHUTDOWN_SECONDS if given is None else given
        if not isinstance(limit, int | float) or limit >= seconds + DRAIN_MARGIN_SECONDS:
            continue  # sound, or Serve has said what is wrong
        if number is None or given is None:
            reason = f"the {name}'s graceful_shutdown_timeout_s is not set, which means {limit:g}"
            yield too_long(key, limit - DRAIN_MARGIN_SECONDS, reason)
        else:
            least = f"it must be at least {seconds + DRAIN_MARGIN_SECONDS:g}: args.drain.{key} is {seconds:g}"
            reason = f"what is left needs {DRAIN_MARGIN_SECONDS:g} s to end before Ray Serve kills it"
            yield (*at, "deployments", number, "graceful_shutdown_timeout_s"), f"{least}, and {reason}"
    hard_stop = _number(environ.get(HARD_STOP), HARD_STOP_SECONDS)
    if environ.get(HA_PROXY) == "1" and hard_stop < drain.ingress_seconds + DRAIN_MARGIN_SECONDS:
        yield too_long(
            "ingress_seconds",
            hard_stop - DRAIN_MARGIN_SECONDS,
            f"HAProxy cuts streams {hard_stop:g} s after each change of the ingresses; set {HARD_STOP} higher",
        )


def _number(text: str | None, default: float) -> float:
    """Of a variable. One that is no number stops Ray Serve with a sentence of its own."""
    try:
        return float(text) if text else default
    except ValueError:
        return default


def _options(
    value: Any, model: type[BaseModel], at: KeyPath, places: Mapping[str, list[str]]
) -> Iterator[tuple[KeyPath, str]]:
    """One of our two roots. Its unknown keys are found by `_walk`, which knows where in the whole file they belong."""
    for place, sentence in _walk(value, model, at, places):
        if "that key is unknown" in sentence:
            yield place, sentence
    try:
        model.model_validate(value)
    except ValidationError as error:
        for place, sentence in sentences(error, value):
            if "that key is unknown" not in sentence:
                yield (*at, *place), sentence


def _deployment(deployment: dict[str, Any], at: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    limit = deployment.get("max_ongoing_requests")
    if limit is None:
        yield (
            (*at, "max_ongoing_requests"),
            f"is missing: Ray Serve's default is 5; set it, at most {MAX_ONGOING_REQUESTS}",
        )
    elif isinstance(limit, int) and limit > MAX_ONGOING_REQUESTS:
        yield (
            (*at, "max_ongoing_requests"),
            f"it must be at most {MAX_ONGOING_REQUESTS}, or health checks queue behind streams",
        )
    if "request_router_config" in deployment:
        yield (*at, "request_router_config"), "it must not be set: the application brings its own router"
    selector = (deployment.get("ray_actor_options") or {}).get("label_selector")
    for label, value in selector.items() if isinstance(selector, dict) else ():
        if isinstance(value, str) and " " in value:
            place = (*at, "ray_actor_options", "label_selector", label)
            yield place, "it must have no space: Ray takes that for a part of a value, which then no node has"


def _replica(deployment: dict[str, Any], args: dict[str, Any], at: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    if "user_config" in deployment:
        yield (
            (*at, "user_config"),
            f"the {REPLICA} takes none; what may change at run time is the {INGRESS}'s user_config",
        )
    num_gpus = (deployment.get("ray_actor_options") or {}).get("num_gpus") or 0
    if not isinstance(num_gpus, int | float):
        return
    model = args.get("model")
    device = model.get("device") if isinstance(model, dict) else None
    place: KeyPath = (*at, "ray_actor_options", "num_gpus")
    if num_gpus > 1:
        yield place, "it must be at most 1: one replica is one GPU (there is no tensor parallelism); raise num_replicas"
    if num_gpus > 0 and device == "cpu":
        yield place, "args.model.device is 'cpu', so the GPU would be idle"
    if num_gpus == 0 and device == "cuda":
        yield (
            place,
            "must be 1, for args.model.device is 'cuda': Ray hides the GPUs from a replica that asks for none",
        )


def _ingress(deployment: dict[str, Any], at: KeyPath, places: Mapping[str, list[str]]) -> Iterator[tuple[KeyPath, str]]:
    value = deployment.get("user_config") or {}
    if not isinstance(value, dict):
        return  # Serve has said so
    yield from _options(value, IngressUserConfig, (*at, "user_config"), places)
    if (deployment.get("ray_actor_options") or {}).get("num_gpus"):
        yield (*at, "ray_actor_options", "num_gpus"), f"it must be 0: the {INGRESS} uses no GPU"
    router = value.get("router") or {}
    waiting = router.get("max_queued_requests") if isinstance(router, dict) else None
    waiting = RouterOptions().max_queued_requests if waiting is None else waiting
    limit = deployment.get("max_ongoing_requests")
    if type(waiting) is type(limit) is int and waiting >= limit:
        reason = "or Serve turns requests away before the router can"
        place: KeyPath = (*at, "user_config", "router", "max_queued_requests")
        yield place, f"{waiting} may wait; it must be below the Ingress's max_ongoing_requests ({limit}), {reason}"


# ---- the reference -------------------------------------------------------------------------------------------------


def reference() -> str:
    """Every option of config.py as markdown tables, from the pydantic models."""
    blocks = []
    for root, model in ROOTS:
        for place, group in _groups(model, root):
            rows = [
                _row(name, field) for name, field in group.model_fields.items() if not list(models_in(field.annotation))
            ]
            title = f"#### `{place}`\n\n{_one_line(group.__doc__)}\n"
            table = ["| key | type | default | what it does |", "|---|---|---|---|", *rows]
            blocks.append(title + ("\n" + "\n".join(table) + "\n" if rows else ""))
    return "\n".join(blocks)


def _groups(model: type[BaseModel], at: str) -> Iterator[tuple[str, type[BaseModel]]]:
    yield at, model
    for name, field in model.model_fields.items():
        for inner in models_in(field.annotation):
            yield from _groups(inner, f"{at}.{name}")


def _row(name: str, field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    cells = [
        f"`{name}`",
        _type(field.annotation, field.metadata),
        f"`{json.dumps(default)}`",
        _one_line(field.description),
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


_WORDS = {int: "integer", float: "number", str: "text", bool: "true or false", NoneType: "null"}
_BOUNDS = {"ge": ">= {}", "gt": "> {}", "le": "<= {}", "lt": "< {}"}


def _type(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        extra = [bound for item in annotation.__metadata__ for bound in getattr(item, "metadata", [item])]
        return _type(inner[0], [*extra, *metadata])
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in inner)
    if origin in (Union, UnionType):
        return " or ".join(_type(part) for part in inner)
    if origin is list:
        return f"list of {_type(inner[0])}"
    if origin is dict:
        return f"mapping of {_type(inner[0])} to {_type(inner[1])}"
    bounds = [text.format(getattr(m, name)) for m in metadata for name, text in _BOUNDS.items() if hasattr(m, name)]
    return " ".join([_WORDS[annotation], ", ".join(bounds)]).strip()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0 if all files are sound."""
    parser = argparse.ArgumentParser(prog="check_config", description="Check deploy/*.yaml files without a cluster.")
    parser.add_argument("files", nargs="*", metavar="FILE", help="a configuration for `serve run`")
    parser.add_argument("--check", action="append", default=[], metavar="FILE", dest="files_to_check", help="the same")
    parser.add_argument("--reference", action="store_true", help="print every option as markdown tables")
    arguments = parser.parse_args(argv)
    files = [*arguments.files_to_check, *arguments.files]
    if not files and not arguments.reference:
        parser.error("name a file, or --reference")
    if arguments.reference:
        sys.stdout.write(reference())
    problems = [problem for file in files for problem in check(file)]
    if files:
        sys.stdout.write("\n".join(problems or ["ok"]) + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
