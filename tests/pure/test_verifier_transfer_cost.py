"""The choice between loading KV and computing it again."""

from __future__ import annotations

import builders
from hypothesis import given
from hypothesis import strategies as st

from services.verifier.core.transfer_cost import TransferCost
from shared.messages import CostModel

MB = 10**6


def model(token_ms: float) -> CostModel:
    return builders.cost_model("v", [40.0, 0.5, token_ms, 600.0, 3000.0, 0.7, token_ms], ratio_p90=1, ratio_p99=1)


def test_a_slow_verifier_loads_and_a_fast_one_computes() -> None:
    assert TransferCost(model(1.5)).loading_pays(0, 512, 12 * MB)
    assert not TransferCost(model(0.001), ms_per_mb=50).loading_pays(0, 512, 12 * MB)


def test_the_speed_of_a_slow_redis_is_learned() -> None:
    transfer = TransferCost(model(1.5))
    for _ in range(20):
        transfer.record_load(10 * MB, 10_000)
    assert transfer.ms_per_mb > 900
    assert not transfer.loading_pays(0, 512, 12 * MB)


@given(st.integers(0, 8192), st.integers(1, 64), st.floats(0.01, 10))
def test_blocks_are_loaded_if_that_is_predicted_to_be_faster(held: int, blocks: int, ms_per_mb: float) -> None:
    transfer = TransferCost(model(1.5), ms_per_mb)
    faster = transfer.load_ms(blocks * MB) < transfer.prefill_ms(held, 64 * blocks)
    assert transfer.loading_pays(held, 64 * blocks, blocks * MB) == faster
    assert transfer.prefill_ms(held, 64) > 0, "the batch runs in any case, so its fixed cost is not saved"
    assert transfer.prefill_ms(held + 64, 64) >= transfer.prefill_ms(held, 64)
