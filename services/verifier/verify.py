"""One batch through the target model: forward pass, the target's choices, acceptance, rollback.

Runs in the engine's thread. Loads no torch: the engine may be a twin, which has no model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from services.verifier.core.acceptance import accept
from services.verifier.core.tasks import VerifyOutcome, VerifyTask
from shared import cost
from shared.engine.steps import ChoiceRow, Step
from shared.errors import WispError
from shared.messages import BatchShape
from shared.messages.logprobs import TokenLogprob, pack_logprobs
from shared.models.hidden_states import Part, parts
from shared.sampling.rules import LogitsProcessor

if TYPE_CHECKING:
    from services.verifier.engine_thread import TargetEngine, TargetOutput

PROMPT_ROWS = 64
"""Rows of logits in one pass over a prompt with log-probabilities: a row of a large vocabulary takes 0.6 MB."""


def verify(
    engine: TargetEngine, tasks: Sequence[VerifyTask], *, digests: bool = False
) -> tuple[list[VerifyOutcome], list[BatchShape]]:
    """Verify all tasks; return their outcomes and the shape of each forward pass that ran.

    A batch that fails as a whole is verified in halves. So a batch that is too large for one pass is done in several,
    and a bad task is refused alone. digests: outcomes carry digests of the logits.
    """
    if not tasks:
        return [], []
    try:
        outcomes, shapes = _verify_at_once(engine, tasks, digests)
    except (WispError, ValueError, RuntimeError) as error:
        if len(tasks) == 1:
            engine.release(tasks[0].session_id)
            return [VerifyOutcome(None, 0, 0, 0, error)], []
        half = len(tasks) // 2
        first, first_shapes = verify(engine, tasks[:half], digests=digests)
        second, second_shapes = verify(engine, tasks[half:], digests=digests)
        return first + second, first_shapes + second_shapes
    return outcomes, shapes


def _verify_at_once(
    engine: TargetEngine, tasks: Sequence[VerifyTask], digests: bool
) -> tuple[list[VerifyOutcome], list[BatchShape]]:
    prompts = {i: _prompt_logprobs(engine, task) for i, task in enumerate(tasks) if _wants_prompt(task)}
    drafts = [_usable_draft(engine, task) for task in tasks]
    steps = [_step(engine, task, draft) for task, draft in zip(tasks, drafts, strict=True)]
    computed = [step for step in steps if step.tokens]
    if not computed:
        # All tasks are chunks of prefill that were cached already.
        done = [VerifyOutcome(None, 0, engine.cached(task.session_id), 0) for task in tasks]
        return done, [cost.EMPTY]
    output = engine.forward(computed)
    shape = cost.shape_of((len(step.tokens), engine.cached(step.session), step.rows) for step in computed)

    rounds = [i for i, step in enumerate(steps) if step.rows]
    starts = {}
    row = 0
    for i in rounds:
        starts[i] = row
        row += steps[i].rows
    choices = _choices(output, tasks, drafts, starts)

    outcomes = []
    for i, (task, step) in enumerate(zip(tasks, steps, strict=True)):
        if i not in starts:
            outcomes.append(VerifyOutcome(None, 0, engine.cached(task.session_id), len(step.tokens)))
            continue
        verdict = accept(drafts[i], choices[i], task.room, task.stop_ids)
        rows = slice(starts[i], starts[i] + len(choices[i]))
        prompt, shapes = prompts.get(i, ([], []))
        # The KV of accepted draft tokens is right; the bonus token has none yet.
        engine.truncate(task.session_id, len(task.tokens) + verdict.accepted)
        outcomes.append(
            VerifyOutcome(
                verdict,
                len(drafts[i]),
                engine.cached(task.session_id),
                len(step.tokens) + sum(one.new_tokens for one in shapes),
                hidden=_hidden(engine, task) if verdict.finish is None else (),
                logits_digest=_digest(task, output.bits(rows)) if digests else None,
                logprobs=pack_logprobs([*prompt, *_logprobs(task, output, starts[i], verdict.tokens)]),
                logprobs_from=len(task.tokens) - len(prompt),
            ),
        )
    return outcomes, [*(one for _, extra in prompts.values() for one in extra), shape]


def _usable_draft(engine: TargetEngine, task: VerifyTask) -> list[int]:
    """Return the part of a draft that is verified.

    It holds no more tokens than may be committed beside the bonus token, and than the context has room for. It ends
    before the first id that is not in the vocabulary: that would be rejected in any case.
    """
    if task.prefill_to is not None:
        return []
    most = max(0, min(task.room - 1, engine.max_len - len(task.tokens)))
    return list(takewhile(lambda token: token < engine.vocab_size, task.draft[:most]))


def _step(engine: TargetEngine, task: VerifyTask, draft: list[int]) -> Step:
    """Attach a task's session and return its part of the forward pass."""
    # The last token's logits are needed, so it is computed again even if its KV is cached.
    held = min(engine.attach(task.session_id, task.tokens), len(task.tokens) - 1)
    if task.prefill_to is not None:
        return Step(task.session_id, task.tokens[held : max(held, task.prefill_to)], rows=0)
    engine.truncate(task.session_id, held)
    return Step(task.session_id, [*task.tokens[held:], *draft], rows=len(draft) + 1)


def _digest(task: VerifyTask, bits: bytes) -> str:
    """Return a digest of the bits of the rows from which the target's choices were made."""
    digest = task.digest or hashlib.sha256()
    digest.update(bits)
    return str(digest.hexdigest()[:16])


def _wants_prompt(task: VerifyTask) -> bool:
    """Return whether the log-probabilities of the prompt come with this task: with the session's first verdict."""
    wanted = task.sampling.logprobs
    return wanted is not None and wanted.prompt_len == len(task.tokens) and task.prefill_to is None


def _prompt_logprobs(engine: TargetEngine, task: VerifyTask) -> tuple[list[TokenLogprob], list[BatchShape]]:
    """Compute a prompt again, also where its KV is cached, and return the log-probabilities of all but its first token.

    Returns the shapes of the passes too. Few rows of logits are held at once.
    """
    tokens, found, shapes = task.tokens, list[TokenLogprob](), list[BatchShape]()
    engine.attach(task.session_id, tokens)
    engine.truncate(task.session_id, 0)
    for start in range(0, len(tokens) - 1, PROMPT_ROWS):
        piece = tokens[start : min(start + PROMPT_ROWS, len(tokens) - 1)]
        output = engine.forward([Step(task.session_id, piece, rows=len(piece))])
        shapes.append(cost.shape_of([(len(piece), engine.cached(task.session_id), len(piece))]))
        found += _logprobs(task, output, 0, tokens[start + 1 : start + 1 + len(piece)])
    return found, shapes


def _logprobs(task: VerifyTask, output: TargetOutput, start: int, tokens: Sequence[int]) -> list[TokenLogprob]:
    """Return the log-probabilities that a task asks for: of these tokens, by the rows of logits from `start` on."""
    if (wanted := task.sampling.logprobs) is None:
        return []
    return output.logprobs(slice(start, start + len(tokens)), tokens, wanted.top)


def _hidden(engine: TargetEngine, task: VerifyTask) -> list[Part]:
    """Return the packed hidden states that a task asks for, as far as the session is cached."""
    held = engine.cached(task.session_id)
    if task.hidden_from is None or task.hidden_from >= held or not engine.keeps_hidden:
        return []
    bits = engine.hidden_bits(task.session_id, task.hidden_from, held)
    return list(parts(bits, task.hidden_from, task.hidden_format))


def _choices(
    output: TargetOutput, tasks: Sequence[VerifyTask], drafts: Sequence[Sequence[int]], starts: dict[int, int]
) -> dict[int, list[int]]:
    """Return the target's choices by task, position after position, up to the first that differs from the draft.

    Each position has the rules of its own prefix: the session's tokens and the draft tokens before it.

    starts: first row of logits of each task.
    """
    choices: dict[int, list[int]] = {i: [] for i in starts}
    ruled = {i: LogitsProcessor(tasks[i].sampling, tasks[i].tokens) for i in starts if tasks[i].sampling.rules}
    agreeing = list(starts)
    depth = 0
    while agreeing:
        chosen = output.choose(
            [
                ChoiceRow(
                    starts[i] + depth,
                    tasks[i].sampling,
                    len(tasks[i].tokens) + depth,
                    tasks[i].prompt_len,
                    ruled.get(i),
                )
                for i in agreeing
            ]
        )
        for i, token in zip(agreeing, chosen, strict=True):
            choices[i].append(token)
            if i in ruled:
                ruled[i].push(token)
        agreeing = [
            i
            for i in agreeing
            if depth < len(drafts[i])
            and drafts[i][depth] == choices[i][depth]
            # Behind the end of the text the rules may allow no token.
            and not (i in ruled and choices[i][depth] in tasks[i].stop_ids)
        ]
        depth += 1
    return choices
