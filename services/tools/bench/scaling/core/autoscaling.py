"""When Kubernetes would start another verifier: the rule of `k8s/components/keda/verifier.yaml`. Pure.

Prometheus reads the scheduler's metrics every `SCRAPE_S`. The HorizontalPodAutoscaler that KEDA makes asks every
`SYNC_S` (the default of Kubernetes' `--horizontal-pod-autoscaler-sync-period`) for averages over the last seconds, and
takes the largest of what they propose. The averages reach back before a load's step: it is believed after some time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

SCRAPE_S = 5.0
SYNC_S = 15.0
TOLERANCE = 0.1
"""A measured value within this share of the wanted one changes nothing."""


@dataclass(frozen=True)
class Seen:
    """A scheduler's metrics at one moment."""

    queue_delay_s: float = 0.0
    utilization: float = 0.0
    met: float = 0.0
    missed: float = 0.0


@dataclass(frozen=True)
class Trigger:
    """One of the rule's metrics."""

    metric: str
    wanted: float
    over_s: int
    """How far back its average reaches."""
    measured: Callable[[Sequence[Seen]], float]
    """Its value, from the samples of that time."""


def _missed_share(samples: Sequence[Seen]) -> float:
    missed, met = samples[-1].missed - samples[0].missed, samples[-1].met - samples[0].met
    return missed / (missed + met) if missed else 0.0


TRIGGERS = {
    "queue-delay": Trigger(
        "wisp_scheduler_predicted_queue_delay_seconds",
        0.2,
        15,
        lambda samples: sum(seen.queue_delay_s for seen in samples) / len(samples),
    ),
    "deadlines-missed": Trigger("wisp_scheduler_rounds_total", 0.05, 60, _missed_share),
    "utilization": Trigger(
        "wisp_scheduler_utilization",
        0.7,
        30,
        lambda samples: sum(seen.utilization for seen in samples) / len(samples),
    ),
}


def seen(text: str) -> Seen:
    """What a scheduler's `/metrics` says."""
    values = {
        (sample.name, sample.labels.get("deadline", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }

    def value(trigger: str, label: str = "") -> float:
        return values.get((TRIGGERS[trigger].metric, label), 0.0)

    return Seen(
        queue_delay_s=value("queue-delay"),
        utilization=value("utilization"),
        met=value("deadlines-missed", "met"),
        missed=value("deadlines-missed", "missed"),
    )


def wanted(verifiers: int, samples: Sequence[Seen]) -> tuple[int, str]:
    """How many verifiers there should be, and the trigger that says so. `samples`: one each `SCRAPE_S`, newest last."""
    proposals = []
    for name, trigger in TRIGGERS.items():
        ratio = trigger.measured(samples[-round(trigger.over_s / SCRAPE_S) :]) / trigger.wanted
        changed = abs(ratio - 1) > TOLERANCE
        proposals.append((max(1, math.ceil(verifiers * ratio)) if changed else verifiers, name))
    return max(proposals, key=lambda proposal: proposal[0])
