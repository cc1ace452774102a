"""The rule by which Kubernetes starts another verifier, as in `k8s/components/keda/verifier.yaml`.

Prometheus reads the scheduler's metrics every `SCRAPE_S`. The HorizontalPodAutoscaler that KEDA creates evaluates
averages over the last seconds every `SYNC_S` (the default of Kubernetes' `--horizontal-pod-autoscaler-sync-period`),
and takes the largest proposal. The averages reach back before a step of the load, so the rule reacts after some time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

SCRAPE_S = 5.0
SYNC_S = 15.0
UP_SHARE, UP_PODS = 1.0, 2
"""Most verifiers that are started at a time: this share of the present number, or this many if that is more."""
STABLE_S = 300.0
"""A verifier is stopped only if all proposals of this time are below the present number."""
DOWN_EVERY_S = 120.0
"""Least time between two stops."""
TOLERANCE = 0.1
"""A measured value within this share of the wanted one changes nothing."""


@dataclass(frozen=True)
class SchedulerMetrics:
    """The metrics of a scheduler at one moment."""

    queue_delay_s: float = 0.0
    demand: float = 0.0
    met: float = 0.0
    """Rounds that met their deadline, since the start."""
    missed: float = 0.0


@dataclass(frozen=True)
class Trigger:
    """One metric of the rule."""

    metric: str
    wanted: float
    over_s: int
    """Time that the average covers."""
    measured: Callable[[Sequence[SchedulerMetrics]], float]
    """Returns the value from the samples of that time."""


def _missed_share(samples: Sequence[SchedulerMetrics]) -> float:
    missed, met = samples[-1].missed - samples[0].missed, samples[-1].met - samples[0].met
    return missed / (missed + met) if missed else 0.0


TRIGGERS = {
    "queue-delay": Trigger(
        "wisp_scheduler_predicted_queue_delay_seconds",
        0.2,
        15,
        lambda samples: sum(sample.queue_delay_s for sample in samples) / len(samples),
    ),
    "deadlines-missed": Trigger("wisp_scheduler_rounds_total", 0.05, 60, _missed_share),
    "demand": Trigger(
        "wisp_scheduler_demand",
        0.5,
        30,
        lambda samples: sum(sample.demand for sample in samples) / len(samples),
    ),
}


def desired_verifiers(current: int, samples: Sequence[SchedulerMetrics]) -> tuple[int, str]:
    """Return the desired number of verifiers, and the trigger that proposes it.

    samples: one for each `SCRAPE_S`, newest last.
    """
    proposals = []
    for name, trigger in TRIGGERS.items():
        ratio = trigger.measured(samples[-round(trigger.over_s / SCRAPE_S) :]) / trigger.wanted
        changed = abs(ratio - 1) > TOLERANCE
        proposals.append((max(1, math.ceil(current * ratio)) if changed else current, name))
    return max(proposals, key=lambda proposal: proposal[0])


class Autoscaler:
    """The number of verifiers over time, between a least and a most one, as KEDA's autoscaler changes it."""

    def __init__(self, least: int, most: int) -> None:
        self.current = least
        """Verifiers that are wanted, those that are still starting included."""
        self._least, self._most = least, most
        longest_s = max(trigger.over_s for trigger in TRIGGERS.values())
        self._samples: deque[SchedulerMetrics] = deque(maxlen=round(longest_s / SCRAPE_S) + 1)
        self._proposals: deque[tuple[float, int]] = deque()
        self._synced_s = self._stopped_s = -math.inf

    def sample(self, metrics: SchedulerMetrics) -> None:
        """Add the metrics of this moment. Call it every `SCRAPE_S`."""
        self._samples.append(metrics)

    def change(self, now_s: float) -> tuple[int, str]:
        """Return how many verifiers to start, or to stop if negative, and the metric that decided."""
        if now_s - self._synced_s < SYNC_S:
            return 0, ""
        self._synced_s = now_s
        desired, metric = desired_verifiers(self.current, list(self._samples))
        desired = min(self._most, max(self._least, desired))
        self._proposals.append((now_s, desired))
        while now_s - self._proposals[0][0] > STABLE_S:
            self._proposals.popleft()
        before = self.current
        if desired > before:
            self.current = min(desired, before + max(UP_PODS, math.floor(UP_SHARE * before)))
        elif max(wanted for _, wanted in self._proposals) < before and now_s - self._stopped_s >= DOWN_EVERY_S:
            self.current, self._stopped_s = before - 1, now_s
        return self.current - before, metric
