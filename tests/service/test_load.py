"""`make load KILLS=1` in short: locust against a real cluster, a replica killed through Ray meanwhile, and nothing lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.service.live import KEY, REPOSITORY, Service, launched


@launched
def test_a_kill_under_load_loses_nothing(service: Service, tmp_path: Path) -> None:
    before = service.pids("Replica")
    report = tmp_path / "report.html"
    command = [sys.executable, "-m", "locust", "-f", "loadtests/locustfile.py", "--headless", "--only-summary"]
    command += ["--host", service.url, "--api-key", KEY, "--report", str(report), "--rate", "8", "-t", "10s"]
    command += ["--prompt-lens", "4-60", "--output-lens", "40-90", "--kill-period", "2", "--kills", "1"]
    command += ["--slo-ttft-ms", "60000", "--slo-e2el-ms", "90000"]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "RAY_ADDRESS": service.ray_address},
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    said = done.stdout[-8000:] + done.stderr[-8000:]
    assert done.returncode == 0, said
    result = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"bench"')))
    (kill,) = result["kills"]
    assert kill["replica"] in before
    assert (result["lost"], result["failed"], result["wrong"]) == (0, 0, [])
    assert result["completed"] == result["good"] >= 40
    page = report.read_text()
    assert kill["replica"] in page
    assert 'class="mark"' in page
    service.check_whole()
    assert len(service.pids("Replica").keys() - before.keys()) == 1
