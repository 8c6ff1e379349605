"""Alerts and dashboard: their queries are valid, name metrics that the product exports, and lead to a runbook.

Promtool checks queries and runs the alerts' own tests; without it (Debian: apt-get install prometheus) these tests are skipped.
"""

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from dis_scale.process import counts
from pipelines import metrics
from tests.support import pods
from tests.support.stand_ins import stand_in

ROOT = Path(__file__).parent.parent
PROMETHEUS = ROOT / "ops" / "prometheus"
DASHBOARD = ROOT / "ops" / "grafana" / "dashboard.json"
EXPORTED = {f"ray_dis_scale_{name}" for name in [*metrics.GAUGES, *(f"{total}_total" for total in counts.MEANINGS)]}
OTHERS = {
    "kuberay_job_deployment_status",
    "kuberay_cluster_info",
    "kube_pod_container_status_restarts_total",
    "kube_cronjob_status_last_successful_time",
    "kube_cronjob_created",
    "kube_cronjob_spec_suspend",
    "dis_scale_slurm_job_state",
    "dis_scale_slurm_jobs_timestamp_seconds",
}
"""KubeRay's (ray-operator/controllers/ray/metrics of 1.7.0), kube-state-metrics' (docs/metrics/workload), and our own script's."""
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is missing: apt-get install prometheus")


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text())["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def panels() -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return shown


def queries() -> list[str]:
    """Return the dashboard's queries as Grafana sends them, its variables replaced."""
    return [re.sub(r"\$\w+", ".*", target["expr"]) for panel in panels() for target in panel["targets"]]


def metrics_in(texts: list[str]) -> set[str]:
    return {name for text in texts for name in re.findall(r"\b(?:ray_dis_scale|dis_scale_slurm|kuberay|kube)_\w+", text)}


def test_states_of_slurm_jobs_are_exported(tmp_path: Path) -> None:
    reasons = ["None", "Priority", "JobHeldUser", "JobHeldAdmin", "JobHoldMaxRequeue", "launch failed requeued held"]
    reasons += ["QOSUsageThreshold"]
    queue = "".join(f"{job}|{reason}\\n" for job, reason in enumerate(reasons, 9))
    for command, answer in (("sacct", "7|FAILED\\n8|CANCELLED by 1000\\n"), ("squeue", queue)):
        stand_in(tmp_path, command, f"printf '{answer}'")
    script, out = PROMETHEUS / "slurm-jobs.sh", tmp_path / "jobs.prom"
    subprocess.run([script, out], env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}, check=True)
    lines = [line for line in out.read_text().splitlines() if not line.startswith("#")]
    assert abs(float(lines.pop().removeprefix('dis_scale_slurm_jobs_timestamp_seconds{name="dis-scale"} ')) - time.time()) < 60
    assert lines == [
        f'dis_scale_slurm_job_state{{slurm_job="{n}",state="{s}"}} 1'
        for n, s in ((7, "FAILED"), (8, "CANCELLED"), (12, "HELD"), (13, "HELD"), (14, "HELD"))
    ]
    (tmp_path / "sacct").write_text("#!/bin/sh\nexit 1\n")
    failed = subprocess.run([script, out], env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}, check=False)
    assert failed.returncode == 1
    assert len(out.read_text().splitlines()) == 10, "what is known stays"


def promtool(*arguments: object) -> None:
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_use_metrics_that_exist() -> None:
    used = [metrics_in([rule["expr"]]) for rule in alerts()]
    assert all(used)
    assert set().union(*used) - EXPORTED == OTHERS


def test_the_dashboard_shows_every_metric() -> None:
    variables = json.loads(DASHBOARD.read_text())["templating"]["list"]
    assert metrics_in(queries()) == EXPORTED
    assert metrics_in([variable.get("definition", "") for variable in variables]) <= EXPORTED


def test_panels_have_their_own_ids_and_places() -> None:
    ids = [panel["id"] for panel in panels()]
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels()]
    assert len(set(ids)) == len(set(places)) == len(panels())
    assert all(target["datasource"]["uid"] == "${datasource}" for panel in panels() for target in panel["targets"])


def test_each_alert_names_its_runbook() -> None:
    for rule in alerts():
        assert rule["alert"] in (ROOT / rule["annotations"]["runbook"]).read_text()
        assert rule["labels"]["severity"] in ("warning", "critical")


def test_each_alert_is_tested_quiet_and_firing() -> None:
    """Its expected answers are at least one that is empty and one that is not."""
    tested = yaml.safe_load((PROMETHEUS / "alerts_test.yaml").read_text())["tests"]
    expected = {rule["alert"]: set[bool]() for rule in alerts()}
    for case in tested:
        for test in case.get("alert_rule_test", []):
            expected[test["alertname"]].add(bool(test["exp_alerts"]))
        for test in case.get("promql_expr_test", []):
            (pattern,) = re.findall(r'alertname=~?"([^"]+)"', test["expr"])
            for alert in filter(re.compile(pattern).fullmatch, expected):
                samples = test["exp_samples"]
                named = [sample for sample in samples if alert in sample["labels"] or "alertname" not in sample["labels"]]
                expected[alert].add(bool(named))
    assert {alert for alert, answers in expected.items() if answers != {False, True}} == set()


def test_names_follow_prometheus() -> None:
    """A total ends in _total, a quantity in its unit; neither repeats the prefix."""
    assert all(re.fullmatch(r"ray_dis_scale_[a-z][a-z_]*[a-z]", name) for name in EXPORTED)
    assert [name for name in metrics.GAUGES if name.endswith(("_total", "_count", "_sum", "_bucket", "_s"))] == []


@needs_promtool
def test_promtool_accepts_the_files() -> None:
    promtool("check", "rules", PROMETHEUS / "alerts.yaml")
    promtool("check", "config", PROMETHEUS / "prometheus.yaml")
    promtool("test", "rules", PROMETHEUS / "alerts_test.yaml")


@needs_promtool
def test_promtool_parses_the_dashboards_queries(tmp_path: Path) -> None:
    rules = [{"record": f"panel_{number}", "expr": query} for number, query in enumerate(queries())]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", tmp_path / "rules.yaml")


def test_the_pod_monitor_keeps_our_metrics() -> None:
    spec = yaml.safe_load((PROMETHEUS / "pod-monitor.yaml").read_text())["spec"]
    (endpoint,) = spec["podMetricsEndpoints"]
    (keep,) = endpoint["metricRelabelings"]
    assert {name for name in EXPORTED if not re.fullmatch(keep["regex"], name)} == set()
    assert endpoint["port"] == "metrics"
    groups = [group for name in pods.JOBS for group in pods.groups(pods.rayjob(name))]
    assert len(groups) >= 6
    ports = {group["rayStartParams"].get("metrics-export-port", "8080") for group in groups}
    assert ports == {"8080"}, "KubeRay's default, which the policy opens"
