"""Metrics of deadlines, interference and predictions, for autoscalers, alerts and dashboards."""

from __future__ import annotations

import builders
import pytest

from services.scheduler.metrics import deadline, interference_ms, prediction_error
from shared.cost.model import FALLBACK, predict_ms, shape_of


@pytest.mark.parametrize(
    ("due_ms", "now_ms", "label"),
    [(100.0, 99.0, "met"), (100.0, 100.0, "met"), (100.0, 101.0, "missed"), (None, 5.0, "none")],
)
def test_a_round_is_late_when_its_token_was_due_before_its_result(
    due_ms: float | None, now_ms: float, label: str
) -> None:
    assert deadline(due_ms, now_ms) == label


def test_interference_is_the_time_beyond_that_of_the_round_alone() -> None:
    alone_ms = predict_ms(FALLBACK, shape_of([(4, 13, 4)]))
    answer = builders.result(base_len=10, new_tokens=4, trimmed_to=3, verify_ms=alone_ms + 7)
    assert interference_ms(answer, FALLBACK) == pytest.approx(7)
    assert interference_ms(answer.model_copy(update={"verify_ms": alone_ms / 2}), FALLBACK) == 0
    with pytest.raises(ValueError, match="no time of its own"):
        interference_ms(answer.model_copy(update={"new_tokens": 0}), FALLBACK)


@pytest.mark.parametrize(
    ("predicted_ms", "verify_ms", "error"), [(8.0, 10.0, 0.2), (12.5, 10.0, 0.25), (0.0, 10.0, None), (8.0, 0.0, None)]
)
def test_an_error_of_prediction_is_a_share_of_the_time(
    predicted_ms: float, verify_ms: float, error: float | None
) -> None:
    found = prediction_error(builders.result(predicted_ms=predicted_ms, verify_ms=verify_ms))
    assert found == (error if error is None else pytest.approx(error))
