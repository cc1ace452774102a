"""Whole requests in virtual time: real drafts of recorded answers, and measured costs instead of a clock.

A recorded answer decides which draft tokens are accepted, so a request's time follows from the draft model's real
tokens, the controller's decisions and the costs of each operation, without the noise of a shared machine. The rounds
are those of a drafter beside one verifier (`services.drafter.serving`): states come with the result of the round that
asks for them, and probes and long computations run while rounds are in flight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from services.drafter.control import Controller, ControlWeights, DraftRound, RoundTimes, RuleName, SessionControl
from services.drafter.control.times import SPARE_COMPUTED
from services.drafter.sources import Draft, DraftRequest, DraftSource, States
from services.drafter.sources.registry import HIDDEN
from services.tools.training.generate import sampling
from services.tools.training.run import EVALUATED_TOKENS
from services.tools.training.shards import GeneratedText
from shared.messages import Load

DRAFT_LENGTH = 8


@dataclass(frozen=True)
class RequestCosts:
    """Times in milliseconds."""

    verify_ms: Sequence[float]
    """Of a round with 0, 1, 2, … draft tokens on the verifier, up to the longest draft."""
    prompt_ms: float
    """Of each prompt token."""
    hops_ms: float
    """Of a round's messages."""
    step_ms: float
    """Of a draft step with the token's statistics."""
    caught_up_ms: float
    """Of each committed token that the draft model computes beyond those of an ordinary step."""
    shared: float = 0.0
    """Share of the time of drafting that a round in flight takes longer for it: 0 where verifier and drafter have
    their own cores, 1 where they share one."""

    @property
    def plain_ms(self) -> float:
        """Time of a round without a draft."""
        return self.verify_ms[0] + self.hops_ms

    def draft_ms(self, draft: Draft) -> float:
        """Return the time of a draft."""
        steps = sum(draft.steps.values())
        if not steps:
            return 0.0
        return steps * self.step_ms + max(0, draft.computed - SPARE_COMPUTED) * self.caught_up_ms

    def times(self) -> RoundTimes:
        """Return the times of a drafter that has the verifier's cost model and no measurements."""
        times = RoundTimes()
        load = {"scheduler": "bench", "price_ms": 0.0, "queue_ms": 0.0, "pending": 0, "draft_cap": DRAFT_LENGTH}
        times.apply_load(Load.model_validate({**load, "verify_ms": list(self.verify_ms)}))
        return times


@dataclass(frozen=True)
class VirtualRequest:
    """One answered request."""

    kind: str
    temperature: float
    tokens: int
    """Tokens of the answer."""
    ms: float
    plain_ms: float
    """Time of the same request without drafts."""

    @property
    def speed(self) -> float:
        """Speed against plain decoding."""
        return self.plain_ms / self.ms


def requests(
    source: DraftSource,
    names: tuple[str, ...],
    texts: Sequence[GeneratedText],
    costs: RequestCosts,
    weights: ControlWeights | None,
    rule: RuleName = "marginal",
) -> Iterator[VirtualRequest]:
    """Answer every text in turn with one drafter, which learns from each."""
    controller = Controller(rule, DRAFT_LENGTH, weights, costs.times())
    for number, text in enumerate(texts):
        session = _VirtualSession(f"virtual-{number}", source, names, controller.session(*names), text, costs)
        ms = session.run()
        source.close(session.session_id)
        made = len(text.tokens) - text.prompt_len
        plain_ms = text.prompt_len * costs.prompt_ms + made * costs.plain_ms
        yield VirtualRequest(text.kind, text.temperature, made, ms, plain_ms)


@dataclass
class _VirtualProbe:
    """A draft in the making while rounds are in flight."""

    round: DraftRound
    draft: Draft
    position: int
    """Position of the token that it drafts."""
    ready_ms: float


class _VirtualSession:
    """One request's rounds."""

    def __init__(
        self,
        session_id: str,
        source: DraftSource,
        names: tuple[str, ...],
        control: SessionControl,
        text: GeneratedText,
        costs: RequestCosts,
    ) -> None:
        self.session_id = session_id
        self._source, self._names, self._control = source, names, control
        self._text, self._costs = text, costs
        self._tokens: list[int] = text.tokens.tolist()
        self._length = text.prompt_len
        """Committed tokens."""
        self._now_ms = 0.0
        self._has_states = False
        """True if the round before has brought the states of all tokens but the last."""
        self._probes: dict[str, _VirtualProbe] = {}

    def run(self) -> float:
        """Return the time of the request."""
        while self._length < len(self._tokens):
            self._round()
        return self._now_ms

    def _round(self) -> None:
        self._settle_probes()
        control, costs = self._control, self._costs
        missing = self._length - self._source.starts_at(self.session_id, self._length)
        reads_states = HIDDEN in self._names
        unready, behind = set(self._probes), set()
        if reads_states and HIDDEN not in self._probes:
            if not self._has_states:
                unready.add(HIDDEN)
            elif missing > SPARE_COMPUTED:
                behind.add(HIDDEN)
        room = min(DRAFT_LENGTH, EVALUATED_TOKENS - (self._length - self._text.prompt_len) - 1)
        round_ = control.begin(room, self._text.temperature, unready=unready, behind=behind)
        probes = round_.deferred_probes()
        draft = Draft()
        if round_.longest:
            draft = self._propose(round_, self._names)
            self._now_ms += costs.draft_ms(draft)
            for name, steps in draft.steps.items():
                control.times.learn_draft(name, steps, costs.draft_ms(draft), draft.computed)
        asks = reads_states and not control.rests(HIDDEN)
        for probe in probes:
            (name,) = probe.probed
            made = self._propose(probe, (name,))
            ready_ms = self._now_ms + costs.draft_ms(made)
            self._probes[name] = _VirtualProbe(probe, made, self._length, ready_ms)
        self._verify(round_, draft)
        self._has_states = asks

    def _propose(self, round_: DraftRound, names: tuple[str, ...]) -> Draft:
        states = None
        if self._has_states:
            start = max(0, self._source.starts_at(self.session_id, self._length) - 1)
            states = States(start, self._text.hidden[start : self._length - 1].float().numpy())
        parameters = sampling(self._text.origin, self._text.temperature)
        committed = self._tokens[: self._length]
        return self._source.propose([DraftRequest(self.session_id, committed, parameters, round_, names, states)])[0]

    def _verify(self, round_: DraftRound, draft: Draft) -> None:
        """Have the target verify a draft, and learn from the result."""
        control, costs = self._control, self._costs
        kept, truth = len(draft.tokens), self._tokens[self._length :]
        is_first = self._length == self._text.prompt_len
        new_tokens = kept + (self._length if is_first else 1)
        verify_ms = costs.verify_ms[kept] + (self._length * costs.prompt_ms if is_first else 0.0)
        alone_ms = verify_ms + costs.hops_ms
        for probe in self._probes.values():
            verify_ms += costs.shared * max(0.0, min(probe.ready_ms - self._now_ms, alone_ms))
        accepted = 0
        while accepted < min(kept, len(truth)) and draft.tokens[accepted] == truth[accepted]:
            accepted += 1
        ended = accepted == len(truth)
        verified = accepted if ended else kept
        if not self._probes:
            control.times.learn_round(kept, verify_ms + costs.hops_ms, verify_ms, 0.0, new_tokens)
        drafted = [*draft.tokens, draft.dropped]
        known = not ended and accepted == kept and drafted[kept] is not None
        control.settle(round_, verified, accepted, drafted[kept] == truth[accepted] if known else None)
        self._now_ms += verify_ms + costs.hops_ms
        self._length = min(self._length + accepted + 1, len(self._tokens))

    def _settle_probes(self) -> None:
        """Learn from the probes that are made by now."""
        for name, probe in list(self._probes.items()):
            if probe.ready_ms > self._now_ms:
                continue
            del self._probes[name]
            times, draft = self._control.times, probe.draft
            for source, steps in draft.steps.items():
                times.learn_probe(source, steps, self._costs.draft_ms(draft), draft.computed)
            matches = None if draft.dropped is None else draft.dropped == self._tokens[probe.position]
            self._control.settle(probe.round, 0, 0, matches)
