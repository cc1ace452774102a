"""Real speed of drafting and verifying in one process, without messages, one text after the other."""

from __future__ import annotations

import time
from collections.abc import Sequence

from services.drafter.control import Controller
from services.drafter.sources import DraftRequest, DraftSource, States
from services.tools.training.generate import sampling
from services.tools.training.shards import GeneratedText
from services.verifier.core.tasks import VerifyTask
from services.verifier.verify import verify
from shared.engine import Engine


def tokens_per_second(
    engine: Engine,
    source: DraftSource,
    names: tuple[str, ...],
    controller: Controller,
    text: GeneratedText,
    stop_ids: frozenset[int],
) -> float:
    """Generate a recorded answer again; return its tokens per second after the first token.

    `engine` must keep hidden states. Raises AssertionError if the answer differs from the recorded one.
    """
    session = "colocated"
    recorded: list[int] = text.tokens.tolist()
    tokens = recorded[: text.prompt_len]
    parameters = sampling(text.origin, text.temperature)
    control = controller.session(*names)
    began = 0.0
    while len(tokens) < len(recorded):
        first = len(tokens) == text.prompt_len
        room = len(recorded) - len(tokens)
        round_ = control.begin(0 if first else room - 1, text.temperature)
        needed = max(0, source.starts_at(session, len(tokens)) - 1)
        states = None if first else _states(engine, session, needed, len(tokens))
        started = time.perf_counter()
        draft = source.propose([DraftRequest(session, tokens, parameters, round_, names, states)])[0]
        drafted = time.perf_counter()
        (outcome,), _ = verify(engine, [VerifyTask(session, list(tokens), draft.tokens, parameters, stop_ids, room)])
        done = time.perf_counter()
        assert outcome.verdict is not None, outcome.error
        for name, steps in draft.steps.items():
            control.times.learn_draft(name, steps, (drafted - started) * 1000, draft.computed)
        verify_ms = (done - drafted) * 1000
        if not first:
            control.times.learn_round(len(draft.tokens), verify_ms, verify_ms, 0.0, len(draft.tokens) + 1)
        accepted, kept = outcome.verdict.accepted, len(draft.tokens)
        known = accepted == kept < len(outcome.verdict.tokens) and draft.dropped is not None
        control.settle(round_, kept, accepted, draft.dropped == outcome.verdict.tokens[-1] if known else None)
        tokens = [*tokens, *outcome.verdict.tokens]
        if first:
            began = time.perf_counter()
    elapsed_s = time.perf_counter() - began
    source.close(session)
    engine.release(session)
    assert tokens == recorded, "the answer differs from the recorded one"
    return (len(recorded) - text.prompt_len - 1) / elapsed_s


def _states(engine: Engine, session_id: str, start: int, length: int) -> States:
    return States(start, engine.hidden(session_id, start, length - 1).float().numpy())


def shortened(
    texts: Sequence[GeneratedText], kinds: Sequence[str], temperature: float, tokens: int
) -> list[GeneratedText]:
    """Return one text of each kind at this temperature, its answer cut to `tokens`."""
    chosen = []
    for kind in kinds:
        for text in texts:
            long_enough = len(text.tokens) - text.prompt_len >= tokens
            if text.kind == kind and text.temperature == temperature and long_enough:
                end = text.prompt_len + tokens
                chosen.append(
                    GeneratedText(text.tokens[:end], text.hidden[:end], text.prompt_len, text.origin, temperature, kind)
                )
                break
    return chosen
