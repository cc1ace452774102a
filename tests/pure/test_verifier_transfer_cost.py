"""Whether K/V are loaded or computed again."""

from __future__ import annotations

import builders
from hypothesis import given
from hypothesis import strategies as st

from services.verifier.core.transfer_cost import Worth
from shared.messages import CostModel

MB = 10**6


def model(token_ms: float) -> CostModel:
    return builders.cost_model("v", [40.0, 0.5, token_ms, 600.0, 3000.0, 0.7, token_ms], ratio_p90=1, ratio_p99=1)


def test_a_slow_verifier_loads_and_a_fast_one_computes() -> None:
    assert Worth(model(1.5)).loads(0, 8, 1.5 * MB)
    assert not Worth(model(0.001), ms_per_mb=50).loads(0, 8, 1.5 * MB)


def test_a_slow_redis_is_learned() -> None:
    worth = Worth(model(1.5))
    for _ in range(20):
        worth.loaded(10 * MB, 10_000)
    assert worth.ms_per_mb > 900
    assert not worth.loads(0, 8, 1.5 * MB)


@given(st.integers(0, 8192), st.integers(1, 64), st.floats(0.01, 10))
def test_what_is_loaded_is_what_is_predicted_to_be_faster(held: int, blocks: int, ms_per_mb: float) -> None:
    worth = Worth(model(1.5), ms_per_mb)
    assert worth.loads(held, blocks, MB) == (worth.load_ms(blocks * MB) < worth.prefill_ms(held, 64 * blocks))
    assert worth.prefill_ms(held, 64) > 0, "the batch is computed anyway, its fixed cost is not saved"
    assert worth.prefill_ms(held + 64, 64) >= worth.prefill_ms(held, 64)
