"""One batch through the target model: forward, choose, accept, roll back. Runs in the verifier's model thread."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor

from services.verifier.core.acceptance import accept
from services.verifier.core.tasks import VerifyOutcome, VerifyTask
from shared import cost
from shared.engine import Engine, Step
from shared.errors import WispError
from shared.messages import BatchShape
from shared.models.hidden_states import Part, parts
from shared.sampling.sampler import choose


def verify(
    engine: Engine, tasks: Sequence[VerifyTask], *, digests: bool = False
) -> tuple[list[VerifyOutcome], list[BatchShape]]:
    """Judge every task; also returns the shape of each forward pass that ran. digests: tell the logits' digests.

    A batch that fails as a whole is done in halves, so that what does not fit at once is done in turn, and one bad task
    is refused alone.
    """
    if not tasks:
        return [], []
    try:
        outcomes, shape = _verify_at_once(engine, tasks, digests)
    except (WispError, ValueError, RuntimeError) as error:
        if len(tasks) == 1:
            engine.release(tasks[0].session_id)
            return [VerifyOutcome(None, 0, 0, 0, error)], []
        half = len(tasks) // 2
        first, first_shapes = verify(engine, tasks[:half], digests=digests)
        second, second_shapes = verify(engine, tasks[half:], digests=digests)
        return first + second, first_shapes + second_shapes
    return outcomes, [shape]


def _verify_at_once(
    engine: Engine, tasks: Sequence[VerifyTask], digests: bool
) -> tuple[list[VerifyOutcome], BatchShape]:
    steps = []
    drafts = []
    for task in tasks:
        # At most what may still be committed beside the bonus token, and what the context holds.
        keep = max(0, min(task.room - 1, engine.max_len - len(task.tokens)))
        draft = [] if task.prefill_to is not None else _tokens(task.draft[:keep], engine.vocab_size)
        drafts.append(draft)
        # The last token's logits are needed, so it is computed again even if its K/V are there.
        held = min(engine.attach(task.session_id, task.tokens), len(task.tokens) - 1)
        if task.prefill_to is None:
            engine.truncate(task.session_id, held)
            steps.append(Step(task.session_id, [*task.tokens[held:], *draft], rows=len(draft) + 1))
        else:
            steps.append(Step(task.session_id, task.tokens[held : max(held, task.prefill_to)], rows=0))
    fed = [step for step in steps if step.tokens]
    if not fed:
        # Chunks of prefill that turned out to be cached already.
        done = [VerifyOutcome(None, 0, engine.cached(task.session_id), 0) for task in tasks]
        return done, cost.EMPTY
    output = engine.forward(fed)
    shape = cost.shape_of((len(step.tokens), engine.cached(step.session), step.rows) for step in fed)

    wanted = [i for i, step in enumerate(steps) if step.rows]
    starts = {}
    row = 0
    for i in wanted:
        starts[i] = row
        row += steps[i].rows
    choices = _choices(output.logits, tasks, drafts, starts)

    verdicts = {i: accept(drafts[i], choices[i], tasks[i].room, tasks[i].stop_ids) for i in wanted}
    outcomes = []
    for i, (task, step) in enumerate(zip(tasks, steps, strict=True)):
        verdict = verdicts.get(i)
        if verdict is None:
            outcomes.append(VerifyOutcome(None, 0, engine.cached(task.session_id), len(step.tokens)))
            continue
        # K/V are right for the accepted drafts; the bonus token has none yet.
        engine.truncate(task.session_id, len(task.tokens) + verdict.accepted)
        outcomes.append(
            VerifyOutcome(
                verdict,
                len(drafts[i]),
                engine.cached(task.session_id),
                len(step.tokens),
                hidden=_hidden(engine, task) if verdict.finish is None else (),
                logits_digest=_digest(output.logits[starts[i] : starts[i] + len(choices[i])]) if digests else None,
            ),
        )
    return outcomes, shape


def _tokens(draft: Sequence[int], vocab_size: int) -> list[int]:
    """A draft up to the first id that is no token. It would be rejected there, whatever the model says."""
    return list(takewhile(lambda token: token < vocab_size, draft))


def _digest(logits: Tensor) -> str:
    """Of the bits of these rows: those that a choice was made from."""
    bits = logits.contiguous().view(torch.uint8).numpy(force=True)
    return hashlib.sha256(bits.tobytes()).hexdigest()[:16]


def _hidden(engine: Engine, task: VerifyTask) -> list[Part]:
    """The packed hidden states that a task asks for, as far as the session is cached."""
    held = engine.cached(task.session_id)
    if task.hidden_from is None or task.hidden_from >= held or not engine.keeps_hidden:
        return []
    rows = engine.hidden(task.session_id, task.hidden_from, held)
    bits = rows.to(torch.bfloat16).view(torch.uint16).numpy(force=True)
    return list(parts(bits, task.hidden_from, task.hidden_format))


def _choices(
    logits: Tensor, tasks: Sequence[VerifyTask], drafts: Sequence[Sequence[int]], starts: dict[int, int]
) -> dict[int, list[int]]:
    """The target's choices per task, position by position, only while the draft still agrees."""
    choices: dict[int, list[int]] = {i: [] for i in starts}
    alive = list(starts)
    depth = 0
    while alive:
        chosen = choose(
            logits[[starts[i] + depth for i in alive]],
            [tasks[i].sampling for i in alive],
            [len(tasks[i].tokens) + depth for i in alive],
        )
        for i, token in zip(alive, chosen, strict=True):
            choices[i].append(token)
        alive = [i for i in alive if depth < len(drafts[i]) and drafts[i][depth] == choices[i][depth]]
        depth += 1
    return choices
