"""The product's Prometheus metrics, and the page that lists them."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from pathlib import Path

from import_graph import modules
from prometheus_client import Counter, Gauge, Histogram

PAGE = Path(__file__).parents[1] / "services/METRICS.md"
ALL = "all services"
"""Stands for a service in the section of the metrics that all have."""
SHARED_MODULES = ("shared.broker.metrics", "shared.state.metrics")
"""Modules with metrics of every service."""
KINDS = {Counter: "counter", Gauge: "gauge", Histogram: "histogram"}
_DEFINITION = re.compile(r"^\w+ = (?:Counter|Gauge|Histogram)\(", re.MULTILINE)
_ROW = re.compile(r"^\| `(\w+)` \| (\w+) \| (.*?) \| (.*) \|$", re.MULTILINE)


@dataclass(frozen=True)
class Metric:
    """One metric, as Prometheus shows it."""

    name: str
    kind: str
    labels: str
    meaning: str

    @property
    def row(self) -> str:
        """Its row of the table."""
        return f"| `{self.name}` | {self.kind} | {self.labels} | {self.meaning} |"


def metrics_of(service: str) -> list[Metric]:
    """The metrics that a service defines, or those that all have, in the order of their source."""
    names = SHARED_MODULES if service == ALL else (f"services.{service}.metrics",)
    found = []
    for value in [value for name in names for value in vars(importlib.import_module(name)).values()]:
        if isinstance(value, Counter | Gauge | Histogram):
            kind = KINDS[type(value)]
            name = f"{value._name}_total" if kind == "counter" else value._name
            labels = ", ".join(f"`{label}`" for label in value._labelnames)
            found.append(Metric(name, kind, labels, value._documentation))
    return found


def services_with_metrics() -> list[str]:
    """The services that have metrics of their own, and the name for those that all have."""
    return [ALL, *(name.split(".")[1] for name in modules() if re.fullmatch(r"services\.\w+\.metrics", name))]


def modules_with_metrics() -> set[str]:
    """Every module of the product that defines a metric, by its source."""
    return {name for name, path in modules().items() if _DEFINITION.search(path.read_text())}


def listed(service: str) -> list[Metric]:
    """The metrics that the page lists for a service."""
    section = re.search(rf"^## {service.capitalize()}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [Metric(*row) for row in _ROW.findall(section[1])] if section else []


def exported() -> set[str]:
    """Every name that Prometheus stores."""
    names = set()
    for service in services_with_metrics():
        for metric in metrics_of(service):
            ends = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
            names |= {metric.name + end for end in ends}
    return names
