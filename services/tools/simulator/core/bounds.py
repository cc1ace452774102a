"""Closed-form bounds on the number of devices that a scenario's verifiers can hold under any policy.

A device sends its next request at the latest after the longest promised time: TTFT, TPOT for each further token, and
the pause. In this time the verifier has to compute the prompt and the tokens, and to hold the KV. Every policy computes
at least one row of a step per token, so these bounds hold for all. Rejected drafts cost more.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from services.scheduler.core.batching import hidden_tokens
from services.tools.simulator.core.scenario import Scenario
from shared import cost
from shared.twin.profile import RooflineProfile, TargetProfile

SAMPLES = 2000
"""Requests that the means are taken over."""


@dataclass(frozen=True)
class ScenarioBounds:
    """Bounds on the number of devices, and the figures that they are made of."""

    memory: float
    """Devices whose KV fits the verifiers' memory, if every request takes its longest promised time."""
    arithmetic: float
    """Devices whose prompts and tokens the verifiers can compute in that time."""
    chunked: float
    """Devices of centralized serving, which computes `prefill_tokens` of prompts beside its tokens in one step, if the
    mean step has to keep the shortest promised time per token; 0 if a step of one token does not."""
    cycle_s: float
    """Longest promised time from a request to the same device's next one, pause included: the mean."""
    prompt_ms: float
    """Arithmetic of a request's prompt: the mean."""
    answer_ms: float
    """Arithmetic of its answer, one row per token."""
    alone_ms: float
    """Step of one token on the fastest verifier: reading the weights."""
    hidden_tokens: int
    """Tokens of a step whose arithmetic takes no longer than reading the weights."""
    filled_tokens: int
    """Tokens of a step that `wisp+` fills: those that the scheduler's cost model, which knows few knees, takes for
    hidden. 0 if the verifier is no accelerator to it."""
    shortest_tpot_ms: float
    """Shortest promised time per token."""

    @property
    def tokens_per_round(self) -> float:
        """Tokens that a round has to bring where it misses every other step, for the shortest promised TPOT."""
        return 2 * self.alone_ms / self.shortest_tpot_ms

    def sentences(self) -> list[str]:
        """Return the bounds in words: the most whole devices, so rounded down."""
        most = int(min(self.memory, self.arithmetic))
        return [
            f"no policy can hold more than {most} devices here: if every request took "
            f"its longest promised time ({self.cycle_s:.1f} s with the pause), the KV of {int(self.memory)} would fit, "
            f"and the arithmetic of {int(self.arithmetic)} ({self.prompt_ms:.0f} ms for a prompt and "
            f"{self.answer_ms:.0f} for an answer, on average)",
            f"a step of one token takes {self.alone_ms:.1f} ms and hides the arithmetic of {self.hidden_tokens} "
            f"tokens ({self.filled_tokens} by the cost model of wisp+); with steps of centralized serving as long as "
            f"the shortest promise ({self.shortest_tpot_ms:g} ms) on average, {int(self.chunked)} devices hold; a "
            f"round that misses every other step has to bring {self.tokens_per_round:.1f} tokens",
        ]


def scenario_bounds(scenario: Scenario, target: TargetProfile, seed: int) -> ScenarioBounds | None:
    """Return the bounds of a scenario, with means over sampled requests; None if a class has no SLO.

    There are none for a measured target, whose times do not tell arithmetic from reading the weights, nor with
    autoscaling, which changes the number of verifiers.
    """
    if not isinstance(target, RooflineProfile) or scenario.autoscaling is not None:
        return None
    shortest = inf
    token_ms = 1000 * 2 * target.weights / (target.tflops * 1e12 * target.arithmetic_efficiency)
    cycle_ms = kv_ms = prompt_ms = answer_ms = busy_ms = tokens = prompts = 0.0
    for session in range(SAMPLES):
        request = scenario.request(seed, session, 0)
        if (slo := request.of_class.slo) is None:
            return None
        shortest = min(shortest, slo.tpot_ms)
        decoding_ms = slo.tpot_ms * (request.output_tokens - 1)
        cycle_ms += (slo.ttft_ms + decoding_ms + 1000 * request.think_s) / SAMPLES
        kv_ms += decoding_ms * (request.prompt_tokens + request.output_tokens / 2) / SAMPLES
        prompt_ms += _arithmetic_ms(target, request.prompt_tokens) / SAMPLES
        answer_ms += token_ms * request.output_tokens / SAMPLES
        busy_ms += decoding_ms / SAMPLES
        tokens += request.output_tokens / SAMPLES
        prompts += request.prompt_tokens / SAMPLES
    step_ms = target.time_ms(cost.shape_of([(1, 1, 1)]))
    hidden = int((step_ms - target.step_ms) / token_ms)
    speeds = [scenario.speed_of(number) for number in range(scenario.verifiers)]
    decoding = sum(_chunked(target, scenario.prefill_tokens, prompts / tokens, shortest * speed) for speed in speeds)
    return ScenarioBounds(
        memory=scenario.verifiers * target.kv_tokens * cycle_ms / kv_ms,
        arithmetic=scenario.total_speed * cycle_ms / (prompt_ms + answer_ms),
        chunked=decoding * (tokens * shortest + cycle_ms - busy_ms) / (tokens * shortest),
        cycle_s=cycle_ms / 1000,
        prompt_ms=prompt_ms,
        answer_ms=answer_ms,
        alone_ms=step_ms / max(speeds),
        hidden_tokens=hidden,
        filled_tokens=hidden_tokens(target.cost_model("any")),
        shortest_tpot_ms=shortest,
    )


def _arithmetic_ms(target: RooflineProfile, prompt_tokens: int) -> float:
    """Return the time to compute a prompt, without reading weights and KV."""
    attention = 2 * 2 * target.layers * target.heads * target.head_size * prompt_tokens * prompt_tokens / 2
    operations = 2 * target.weights * prompt_tokens + attention
    return 1000 * operations / (target.tflops * 1e12 * target.arithmetic_efficiency)


def _chunked(target: RooflineProfile, chunk: int, prompt_share: float, tpot_ms: float) -> float:
    """Return the most decoding sessions whose mean step, with full chunks in some, takes no longer than `tpot_ms`.

    prompt_share: prompt tokens per output token. tpot_ms: on a verifier of the target's own speed.
    """
    sessions = 0
    while sessions < 10_000:
        more = sessions + 1
        plain_ms = target.time_ms(cost.shape_of([(1, 1, 1)] * more))
        full_ms = target.time_ms(cost.shape_of([(1, 1, 1)] * more + [(chunk, chunk, 0)]))
        share = more * prompt_share / chunk
        if share > 1 or plain_ms + share * (full_ms - plain_ms) > tpot_ms:
            return sessions
        sessions = more
    return sessions
