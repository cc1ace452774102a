"""Alert rules and queries, as Prometheus itself reads them: each alert fires on the trouble that it is for, not else.

`make tools` fetches promtool where Debian's packages are to be had.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from kustomized import Rendered
from test_manifests import expressions

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "k8s/components/monitoring"
PROMTOOL = shutil.which("promtool") or shutil.which(str(ROOT / ".wisp/tools/bin/promtool"))
STEPS = 120
"""Samples of each series, one each 15 s: half an hour."""
TROUBLE: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "WispNoVerifier": ({"wisp_scheduler_verifiers": "0"}, {"wisp_scheduler_verifiers": "1"}),
    "WispServiceGone": ({'up{service="wisp-metrics"}': "0"}, {'up{service="wisp-metrics"}': "1"}),
    "WispDeadlinesMissed": (
        {
            'wisp_scheduler_rounds_total{deadline="missed"}': "0+2",
            'wisp_scheduler_rounds_total{deadline="met"}': "0+12",
        },
        {
            'wisp_scheduler_rounds_total{deadline="missed"}': "0+1",
            'wisp_scheduler_rounds_total{deadline="met"}': "0+12",
        },
    ),
    "WispQueueDelay": (
        {"wisp_scheduler_predicted_queue_delay_seconds": "1.2"},
        {"wisp_scheduler_predicted_queue_delay_seconds": "0.8"},
    ),
    "WispRequestsRefused": ({"wisp_requests_refused_total": "0+3"}, {"wisp_requests_refused_total": "0+1"}),
    "WispCacheFull": ({"wisp_kv_cache_usage_perc": "0.97"}, {"wisp_kv_cache_usage_perc": "0.9"}),
    "WispCacheAccountingWrong": (
        {"wisp_verifier_integrity_errors_total": "0+0x100 1"},
        {"wisp_verifier_integrity_errors_total": "3"},
    ),
    "WispRoundsResent": (
        {"wisp_rounds_resent_total": "0+3", "wisp_scheduler_rounds_total": "0+50"},
        {"wisp_rounds_resent_total": "0+2", "wisp_scheduler_rounds_total": "0+50"},
    ),
}
"""By alert: series on which it fires, and series on which it does not."""

pytestmark = pytest.mark.skipif(PROMTOOL is None, reason="needs promtool, of Debian's package prometheus")


def promtool(folder: Path, *arguments: str, **files: Any) -> subprocess.CompletedProcess[str]:
    """Run promtool in a folder with these YAML files."""
    assert PROMTOOL is not None
    for name, value in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(value))
    return subprocess.run([PROMTOOL, *arguments], cwd=folder, capture_output=True, text=True, check=False)


def rules() -> Any:
    return yaml.safe_load((MONITORING / "rules.yaml").read_text())["spec"]


def series(name: str, values: str) -> dict[str, str]:
    """Return a series in promtool's notation, in a namespace and of a pod."""
    metric, _, labels = name.rstrip("}").partition("{")
    every = ",".join(filter(None, [labels, 'namespace="wisp",pod="p"']))
    first, _, rest = values.partition(" ")
    repeated = first if "x" in first else f"{first}x{STEPS}"
    return {"series": f"{metric}{{{every}}}", "values": f"{repeated} {f'{rest}x{STEPS}' if rest else ''}".strip()}


def case(alert: str, given: dict[str, str], fires: bool) -> dict[str, Any]:
    return {
        "interval": "15s",
        "input_series": [series(name, values) for name, values in given.items()],
        "promql_expr_test": [
            {
                "expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})',
                "eval_time": "28m",
                "exp_samples": [{"labels": "{}", "value": 1}] if fires else [],
            }
        ],
    }


def test_every_alert_is_tried() -> None:
    assert TROUBLE.keys() == {
        rule["alert"] for group in rules()["groups"] for rule in group["rules"] if "alert" in rule
    }


def test_alerts_fire_on_their_trouble_only(tmp_path: Path) -> None:
    cases = [
        case(alert, given, fires)
        for alert, pair in TROUBLE.items()
        for given, fires in zip(pair, (True, False), strict=True)
    ]
    cases.append(case("WispNoVerifier", {"up": "1"}, True))
    tests = {"rule_files": ["rules.yaml"], "evaluation_interval": "15s", "tests": cases}
    ran = promtool(tmp_path, "test", "rules", "tests.yaml", rules=rules(), tests=tests)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_prometheus_reads_every_rule_and_query(tmp_path: Path, all_rendered: dict[str, Rendered]) -> None:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    asked = [text.replace("$__rate_interval", "1m").replace("$namespace", ".*") for text in asked]
    asked += expressions(all_rendered["production"])
    queries = [{"record": f"query:{number}", "expr": text} for number, text in enumerate(asked)]
    every = {"groups": [*rules()["groups"], {"name": "queries", "rules": queries}]}
    ran = promtool(tmp_path, "check", "rules", "every.yaml", every=every)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"{len(queries) + sum(len(group['rules']) for group in rules()['groups'])} rules found" in ran.stdout
    queries.append({"record": "query:wrong", "expr": "sum(rate(wisp_x[1m])"})
    assert promtool(tmp_path, "check", "rules", "every.yaml", every=every).returncode != 0
