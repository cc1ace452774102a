"""Metrics of deadlines, for autoscalers and alerts."""

from __future__ import annotations

import pytest

from services.scheduler.metrics import deadline


@pytest.mark.parametrize(
    ("due_ms", "now_ms", "label"),
    [(100.0, 99.0, "met"), (100.0, 100.0, "met"), (100.0, 101.0, "missed"), (None, 5.0, "none")],
)
def test_a_round_is_late_when_its_token_was_due_before_its_result(
    due_ms: float | None, now_ms: float, label: str
) -> None:
    assert deadline(due_ms, now_ms) == label
