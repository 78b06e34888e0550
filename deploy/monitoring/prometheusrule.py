"""Writes k8s/components/monitoring/prometheusrule.yaml: the groups of alerts.yaml as Prometheus' operator takes them.

    python deploy/monitoring/prometheusrule.py

alerts.yaml is the source. kustomize cannot put one file's YAML into another, so the copy is written; a test compares them.
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
SOURCE = HERE / "alerts.yaml"
TARGET = HERE.parent.parent / "k8s/components/monitoring/prometheusrule.yaml"

HEAD = """\
# Written by deploy/monitoring/prometheusrule.py from alerts.yaml: edit that one.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: ragged-serve
  namespace: ragged-serve
  labels:
    app.kubernetes.io/name: ragged-serve
    release: prometheus # EDIT, as in podmonitor.yaml
spec:
"""


def text() -> str:
    """The manifest. Lines of alerts.yaml from `groups:` on are kept as they are, two columns further in."""
    _, groups = SOURCE.read_text(encoding="utf-8").split("\ngroups:\n", 1)
    return HEAD + "".join(f"  {line}" if line.strip() else line for line in ["groups:\n", *groups.splitlines(True)])


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
