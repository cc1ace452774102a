"""The speculation controller in simulated sessions: never slower than plain decoding, and close to the best length.

A session decodes against a verifier of known costs. Its drafts are accepted with probabilities that the controller does
not know. Every draft step costs its time, probes included: as if no work could be done while a round is in flight.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import builders
import pytest

from services.drafter.control import Controller, DraftDecision, DraftToken, RoundTimes
from services.drafter.control.features import logit as log_odds
from services.drafter.control.weights import ControlWeights, Inputs, Logistic
from shared.log_odds import sigmoid

pytestmark = pytest.mark.slow  # thousands of simulated rounds

EXACT = Logistic(inputs=Inputs(features=["confidence"], mean=[0.0], scale=[1.0]), weights=[1.0], bias=0.0)
"""Estimates the acceptance as the confidence."""
HOPS_MS = 5.5
NOISE = 0.08
"""Standard deviation of measured times, as a share."""
LONGEST = 8
TOKENS = 300
RUNS = 2

Curve = Sequence[float]
"""Milliseconds to verify 1, 2, 3, … rows."""


@dataclass(frozen=True)
class Machine:
    """Costs of a verifier and of a draft model."""

    verify_ms: Curve
    step_ms: float
    predicted: Curve = ()
    """The cost model's prediction of `verify_ms`; the same if empty."""


MACHINES = {
    # Products bound by arithmetic from the first row: five rows cost three times one.
    "torch bfloat16, AVX2": Machine([63 + 34 * k for k in range(9)], 5.0),
    "torch float32, AVX2": Machine([75, 150, 149, 147, 134, 135, 136, 136, 137], 5.0),
    "compiled, AVX2": Machine([20, 21, 22, 23, 24, 27, 30, 32.5, 35], 2.0),
    "compiled, predicted by a line": Machine(
        [20, 21, 22, 23, 24, 27, 30, 32.5, 35], 2.0, [20 + 1.8 * k for k in range(9)]
    ),
    "compiled, predicted too low": Machine(
        [20, 21, 22, 23, 24, 27, 30, 32.5, 35], 2.0, [10 + 0.3 * k for k in range(9)]
    ),
    "AVX-512": Machine([29.7 + 0.9 * k for k in range(9)], 3.4),
    "GPU": Machine([18 + 0.05 * k for k in range(9)], 1.5),
    "slow device": Machine([29.7 + 0.9 * k for k in range(9)], 40.0),
}

Process = Callable[[int], float]
"""Mean acceptance of a draft token by the number of tokens so far."""
PROCESSES: dict[str, Process] = {
    **{f"{a:g}": (lambda _, a=a: a) for a in (0.0, 0.2, 0.4, 0.6, 0.8, 0.95)},  # type: ignore[misc]
    "good, then bad": lambda n: 0.9 if n < 60 else 0.05,
    "bad, then good": lambda n: 0.05 if n < 100 else 0.85,
    "alternating": lambda n: 0.8 if n // 25 % 2 else 0.1,
}


@dataclass
class Session:
    """One simulated session."""

    machine: Machine
    process: Process
    rng: random.Random
    optimism: float
    """Log odds by which the draft's confidence exceeds its acceptance."""
    ms: float = 0.0
    tokens: int = 0
    lengths: list[int] = field(default_factory=list)

    def noisy(self, ms: float) -> float:
        return ms * max(0.5, self.rng.gauss(1.0, NOISE))

    def token(self) -> tuple[float, float]:
        """Return a draft token's chance to be accepted and its confidence."""
        mean = self.process(self.tokens)
        chance = mean if mean in (0.0, 1.0) else sigmoid(log_odds(mean) + self.rng.gauss(0.0, 1.0))
        return chance, sigmoid(log_odds(chance) + self.optimism)

    def run(self, controller: Controller) -> float:
        """Decode `TOKENS` tokens; return the speed against plain decoding."""
        control, times, rng = controller.session("hidden"), controller.times, self.rng
        while self.tokens < TOKENS:
            round_ = control.begin(min(LONGEST, TOKENS - self.tokens - 1), 0.0)
            chances, steps = [], 0
            while round_.wants("hidden"):
                chance, confidence = self.token()
                chances.append(chance)
                steps += 1
                if round_.add(DraftToken("hidden", confidence)) is not DraftDecision.MORE:
                    break
            draft_ms = steps * self.noisy(self.machine.step_ms)
            if steps:
                times.learn_draft("hidden", steps, draft_ms)
            verify_ms = self.noisy(self.machine.verify_ms[round_.kept])
            hops_ms = self.noisy(HOPS_MS)
            correct = [rng.random() < chance for chance in chances]
            accepted = next((i for i in range(round_.kept) if not correct[i]), round_.kept)
            unsent = len(correct) > round_.kept == accepted
            times.learn_round(round_.kept, hops_ms + verify_ms, verify_ms, 0.0, round_.kept + 1)
            control.settle(round_, round_.kept, accepted, correct[accepted] if unsent else None)
            self.ms += draft_ms + verify_ms + hops_ms
            self.tokens += accepted + 1
            self.lengths.append(round_.kept)
        return self.tokens * (self.machine.verify_ms[0] + HOPS_MS) / self.ms


def controller(machine: Machine) -> Controller:
    """A controller that has the machine's cost model and no measurements."""
    times = RoundTimes()
    curve = [float(ms) for ms in machine.predicted or machine.verify_ms]
    times.apply_load(builders.load(draft_cap=16, queue_ms=0.0, verify_ms=curve))
    return Controller("marginal", LONGEST, ControlWeights(acceptance={"hidden": EXACT}), times)


def speed(machine: Machine, process: Process, optimism: float, runs: int = RUNS) -> float:
    """The mean speed of a drafter's first session, against plain decoding."""
    made = [Session(machine, process, random.Random(seed), optimism).run(controller(machine)) for seed in range(runs)]
    return sum(made) / runs


def best_constant(machine: Machine, process: Process, runs: int = 3 * RUNS) -> float:
    """The mean speed of the best constant length, known beforehand."""

    def constant(length: int) -> float:
        total = 0.0
        for seed in range(runs):
            session = Session(machine, process, random.Random(seed), 0.0)
            while session.tokens < TOKENS:
                chances = [session.token()[0] for _ in range(length)]
                accepted = next((i for i, chance in enumerate(chances) if session.rng.random() >= chance), length)
                session.ms += length * machine.step_ms + machine.verify_ms[length] + HOPS_MS
                session.tokens += accepted + 1
            total += session.tokens * (machine.verify_ms[0] + HOPS_MS) / session.ms
        return total / runs

    return max(constant(length) for length in range(LONGEST + 1))


@pytest.mark.parametrize("optimism", [0.0, 2.0])
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("machine", MACHINES)
def test_drafts_never_lose_against_plain_decoding(machine: str, process: str, optimism: float) -> None:
    assert speed(MACHINES[machine], PROCESSES[process], optimism) >= 0.97


@pytest.mark.parametrize("process", ["0.4", "0.6", "0.8", "0.95", "alternating"])
@pytest.mark.parametrize("machine", ["torch bfloat16, AVX2", "compiled, AVX2", "compiled, predicted by a line", "GPU"])
def test_drafts_are_about_as_fast_as_at_the_best_constant_length(machine: str, process: str) -> None:
    reached = speed(MACHINES[machine], PROCESSES[process], optimism=0.0)
    assert reached >= 0.9 * best_constant(MACHINES[machine], PROCESSES[process])


def test_without_a_prediction_the_costs_are_learned_from_the_rounds() -> None:
    machine = MACHINES["compiled, AVX2"]
    made = Session(machine, PROCESSES["0.6"], random.Random(1), 0.0).run(
        Controller("marginal", LONGEST, ControlWeights(acceptance={"hidden": EXACT}))
    )
    assert made >= 0.9 * best_constant(machine, PROCESSES["0.6"])
