"""Metrics: the page, the alerts and the dashboard name exactly what the code exports."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from metrics_table import ALL, SHARED_MODULES, exported, listed, metrics_of, modules_with_metrics, services_with_metrics

MONITORING = Path(__file__).parents[2] / "k8s/components/monitoring"
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())
VLLM = {
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens_total",
    "generation_tokens_total", "request_success_total", "time_to_first_token_seconds", "inter_token_latency_seconds",
    "e2e_request_latency_seconds", "request_queue_time_seconds", "spec_decode_num_drafts_total",
    "spec_decode_num_draft_tokens_total", "spec_decode_num_accepted_tokens_total",
}  # fmt: skip
"""Suffixes of vLLM's metrics that dashboards use."""


@pytest.mark.parametrize("service", services_with_metrics())
def test_the_page_lists_each_metric_with_kind_labels_and_meaning(service: str) -> None:
    assert [metric.row for metric in listed(service)] == [metric.row for metric in metrics_of(service)]


def test_every_module_with_metrics_is_compared_with_the_page() -> None:
    own = {f"services.{service}.metrics" for service in services_with_metrics() if service != ALL}
    assert modules_with_metrics() == own | set(SHARED_MODULES)


def test_metrics_of_vllm_have_their_names() -> None:
    names = {metric.name for service in services_with_metrics() for metric in metrics_of(service)}
    assert {f"wisp_{suffix}" for suffix in VLLM} <= names


def test_alerts_and_dashboard_use_exported_names() -> None:
    rules = (MONITORING / "rules.yaml").read_text()
    asked = " ".join(target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", []))
    named = set(re.findall(r"\bwisp_\w+", rules)) | set(re.findall(r"\bwisp_\w+", asked))
    assert len(named) > 15
    assert named - exported() == set()


def test_the_dashboard_is_whole() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    charts = [panel for panel in panels if panel["type"] != "row"]
    assert all(panel["title"] and panel["targets"] and panel["fieldConfig"] for panel in charts)
    assert {panel["datasource"]["uid"] for panel in charts} == {"${datasource}"}
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not own & taken, panel["title"]
        taken |= own
