"""Kubernetes' NetworkPolicies as a function: may one pod connect to another? Knows pods and namespaces by their labels.

https://kubernetes.io/docs/concepts/services-networking/network-policies: a pod that no policy selects for a direction is
open in it; else one rule of one policy must allow the connection, in both directions.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.k8s.harness import Pod, selects


@dataclass(frozen=True)
class Peer:
    """One end of a connection."""

    name: str
    labels: Mapping[str, str] | None = None
    """Of the pod. None: it is no pod of the cluster."""
    namespace: Mapping[str, str] | None = field(default=None)
    """Labels of its namespace; None: the policies' own namespace."""
    address: str | None = None

    @classmethod
    def of(cls, pod: Pod) -> Peer:
        """A pod in the policies' namespace."""
        return cls(pod.name, pod.labels)


Connection = tuple[Peer, Peer, int]
"""Source, target, port."""


def misrouted(
    policies: Iterable[Mapping[str, Any]], must: Iterable[Connection], never: Iterable[Connection]
) -> Iterator[str]:
    """What must be open and is not, and what must not be and is."""
    policies = list(policies)
    for source, target, port in must:
        if not allows(policies, source, target, port):
            yield f"{source.name} cannot reach {target.name} at {port}"
    for source, target, port in never:
        if allows(policies, source, target, port):
            yield f"{source.name} can reach {target.name} at {port}"


def allows(policies: Iterable[Mapping[str, Any]], source: Peer, target: Peer, port: int) -> bool:
    """A TCP connection from ``source`` to ``target``. Only pods of the policies' namespace are held to them."""
    policies = list(policies)
    return _is_open(policies, "Egress", source, target, port) and _is_open(policies, "Ingress", target, source, port)


def _is_open(policies: list[Mapping[str, Any]], direction: str, pod: Peer, other: Peer, port: int) -> bool:
    if pod.labels is None or pod.namespace is not None:
        return True
    selected = [
        policy["spec"]
        for policy in policies
        if direction in policy["spec"]["policyTypes"] and selects(policy["spec"]["podSelector"], pod.labels)
    ]
    key, peers = ("egress", "to") if direction == "Egress" else ("ingress", "from")
    rules = [rule for spec in selected for rule in spec.get(key) or []]
    return not selected or any(_has(rule.get(peers), other) and _has_port(rule.get("ports"), port) for rule in rules)


def _has(peers: list[Mapping[str, Any]] | None, other: Peer) -> bool:
    return not peers or any(_is(peer, other) for peer in peers)


def _is(peer: Mapping[str, Any], other: Peer) -> bool:
    if "ipBlock" in peer:
        return other.address is not None and _in_block(other.address, peer["ipBlock"])
    if other.labels is None:
        return False
    if "namespaceSelector" not in peer:
        is_there = other.namespace is None
    else:
        is_there = selects(
            peer["namespaceSelector"], other.namespace or {"kubernetes.io/metadata.name": "ragged-serve"}
        )
    return is_there and ("podSelector" not in peer or selects(peer["podSelector"], other.labels))


def _in_block(address: str, block: Mapping[str, Any]) -> bool:
    ip = ipaddress.ip_address(address)
    return ip in ipaddress.ip_network(block["cidr"]) and not any(
        ip in ipaddress.ip_network(inner) for inner in block.get("except") or []
    )


def _has_port(ports: list[Mapping[str, Any]] | None, port: int) -> bool:
    return not ports or any(
        one.get("protocol", "TCP") == "TCP"
        and ("port" not in one or one["port"] <= port <= one.get("endPort", one["port"]))
        for one in ports
    )
