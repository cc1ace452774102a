"""One batch through the target model: forward pass, the target's choices, acceptance, rollback.

Runs in the engine's thread. Loads no torch: the engine may be a twin, which has no model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING

from services.verifier.core.acceptance import accept
from services.verifier.core.tasks import VerifyOutcome, VerifyTask
from shared import cost
from shared.engine.steps import ChoiceRow, Step
from shared.errors import GrammarError, WispError
from shared.grammar.masks import Grammars, TokenChain
from shared.grammar.token_masks import ChainMask
from shared.messages import BatchShape
from shared.messages.logprobs import TokenLogprob, pack_logprobs
from shared.models.hidden_states import Part, parts
from shared.sampling.rules import LogitsProcessor

if TYPE_CHECKING:
    from services.verifier.engine_thread import TargetEngine, TargetOutput

PROMPT_ROWS = 64
"""Rows of logits in one pass over a prompt with log-probabilities: a row of a large vocabulary takes 0.6 MB."""
FAILURES = (WispError, ValueError, RuntimeError)
"""Errors of a pass or a choice for a task or a batch that it cannot compute."""
MOST_FORCED = 64
"""Most tokens that a task gets in one pass because its grammar forces them."""


def verify(
    engine: TargetEngine,
    tasks: Sequence[VerifyTask],
    *,
    digests: bool = False,
    grammars: Grammars | None = None,
    most_forced: int = MOST_FORCED,
) -> tuple[list[VerifyOutcome], list[BatchShape]]:
    """Verify all tasks; return their outcomes and the shape of each forward pass that ran.

    A batch that fails as a whole is verified in halves. So a batch that is too large for one pass is done in several,
    and a bad task is refused alone. A task that fails at a choice, after the pass, costs the others nothing.

    digests: outcomes carry digests of the logits. grammars: those of the sessions; None if no task has one.
    most_forced: most tokens that a task may get because its grammar forces them.
    """
    if not tasks:
        return [], []
    try:
        outcomes, shapes = _verify_at_once(engine, tasks, digests, grammars, most_forced)
    except FAILURES as error:
        if len(tasks) == 1:
            if most_forced and tasks[0].sampling.grammar is not None:
                # Forced tokens need room in the cache that nobody has reserved.
                return verify(engine, tasks, digests=digests, grammars=grammars, most_forced=0)
            return [_refused(engine, tasks[0], error)], []
        half = len(tasks) // 2
        verify_half = partial(verify, engine, digests=digests, grammars=grammars, most_forced=most_forced)
        first, first_shapes = verify_half(tasks[:half])
        second, second_shapes = verify_half(tasks[half:])
        return first + second, first_shapes + second_shapes
    return outcomes, shapes


def _refused(engine: TargetEngine, task: VerifyTask, error: Exception) -> VerifyOutcome:
    engine.release(task.session_id)
    return VerifyOutcome(None, 0, 0, 0, error)


def _verify_at_once(
    engine: TargetEngine, tasks: Sequence[VerifyTask], digests: bool, grammars: Grammars | None, most_forced: int
) -> tuple[list[VerifyOutcome], list[BatchShape]]:
    prompts = {i: _prompt_logprobs(engine, task) for i, task in enumerate(tasks) if _wants_prompt(task)}
    chains = [_chain(engine, task, grammars, most_forced) for task in tasks]
    steps = [_step(engine, task, chain) for task, chain in zip(tasks, chains, strict=True)]
    computed = [step for step in steps if step.tokens]
    if not computed:
        # All tasks are chunks of prefill that were cached already.
        done = [VerifyOutcome(None, 0, engine.cached(task.session_id), 0) for task in tasks]
        return done, [cost.EMPTY]
    with nullcontext() if grammars is None else grammars.masks_ahead(chains):
        output = engine.forward(computed)
    shape = cost.shape_of((len(step.tokens), engine.cached(step.session_id), step.rows) for step in computed)

    rounds = [i for i, step in enumerate(steps) if step.rows]
    starts = {}
    row = 0
    for i in rounds:
        starts[i] = row
        row += steps[i].rows
    choices, decided, failures = _choices(output, tasks, chains, starts)

    outcomes = []
    for i, (task, step, chain) in enumerate(zip(tasks, steps, chains, strict=True)):
        if i not in starts:
            outcomes.append(VerifyOutcome(None, 0, engine.cached(task.session_id), len(step.tokens)))
            continue
        if i in failures:
            outcomes.append(_refused(engine, task, failures[i]))
            continue
        verdict = accept(chain.tokens, choices[i], task.room, task.stop_ids)
        prompt, shapes = prompts.get(i, ([], []))
        # The KV of accepted draft tokens is right; the bonus token has none yet.
        engine.truncate(task.session_id, len(task.tokens) + verdict.accepted)
        outcomes.append(
            VerifyOutcome(
                # Forced tokens behind the draft are the target's own.
                replace(verdict, accepted=min(verdict.accepted, chain.drafted)),
                chain.drafted,
                engine.cached(task.session_id),
                len(step.tokens) + sum(one.new_tokens for one in shapes),
                hidden=_hidden(engine, task) if verdict.finish is None else (),
                logits_digest=_digest(task, output, decided[i]) if digests else None,
                logprobs=pack_logprobs([*prompt, *_logprobs(task, output, starts[i], verdict.tokens)]),
                logprobs_from=len(task.tokens) - len(prompt),
            ),
        )
    return outcomes, [*(one for _, extra in prompts.values() for one in extra), shape]


def _chain(engine: TargetEngine, task: VerifyTask, grammars: Grammars | None, most_forced: int) -> TokenChain:
    """Return the tokens to verify after a task's committed ones."""
    draft = _usable_draft(engine, task)
    if (grammar := task.sampling.grammar) is None or task.prefill_to is not None:
        return TokenChain(draft, len(draft), [])
    if grammars is None:
        raise GrammarError("this verifier follows no grammars")
    session = grammars.session(task.session_id, grammar)
    room = _chain_room(engine, task)
    return session.chain(task.tokens[grammar.prompt_len :], draft, room, min(most_forced, room), task.stop_ids)


def _certain(task: VerifyTask, chain: TokenChain) -> int:
    """Return the number of the chain's first tokens that need no logits: neither for a choice nor for an answer."""
    return chain.certain if task.sampling.rules is None and task.sampling.logprobs is None else 0


def _usable_draft(engine: TargetEngine, task: VerifyTask) -> list[int]:
    """Return the part of a draft that is verified.

    It holds no more tokens than may be committed beside the bonus token, and than the context has room for. It ends
    before the first id that is not in the vocabulary: that would be rejected in any case.
    """
    if task.prefill_to is not None:
        return []
    most = _chain_room(engine, task)
    return list(takewhile(lambda token: token < engine.vocab_size, task.draft[:most]))


def _chain_room(engine: TargetEngine, task: VerifyTask) -> int:
    return max(0, min(task.room - 1, engine.max_len - len(task.tokens)))


def _step(engine: TargetEngine, task: VerifyTask, chain: TokenChain) -> Step:
    """Attach a task's session and return its part of the forward pass."""
    # The last token's logits are needed, so it is computed again even if its KV is cached.
    held = min(engine.attach(task.session_id, task.tokens), len(task.tokens) - 1)
    if task.prefill_to is not None:
        return Step(task.session_id, task.tokens[held : max(held, task.prefill_to)], rows=0)
    engine.truncate(task.session_id, held)
    rows = len(chain.tokens) + 1 - _certain(task, chain)
    return Step(task.session_id, [*task.tokens[held:], *chain.tokens], rows=rows)


def _digest(task: VerifyTask, output: TargetOutput, rows: Sequence[int]) -> str:
    """Return a digest of the bits of the rows from which the target's choices were made."""
    digest = task.digest or hashlib.sha256()
    for row in rows:
        digest.update(output.bits(slice(row, row + 1)))
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
    output: TargetOutput, tasks: Sequence[VerifyTask], chains: Sequence[TokenChain], starts: dict[int, int]
) -> tuple[dict[int, list[int]], dict[int, list[int]], dict[int, Exception]]:
    """Return the target's choices by task, position after position, up to the first that differs from the chain.

    Each position has the rules and the grammar of its own prefix: the session's tokens and the chain's before it.

    Also returns the rows of logits that decided choices, without those of forced tokens, and the errors of tasks that
    failed at a choice.

    starts: first row of logits of each task, that of the first token that is not certain.
    """
    certain = {i: _certain(tasks[i], chains[i]) for i in starts}
    choices: dict[int, list[int]] = {i: chains[i].tokens[: certain[i]] for i in starts}
    processors: dict[int, LogitsProcessor] = {}
    for i in starts:
        mask = ChainMask(chains[i].allowed, certain[i]) if chains[i].allowed else None
        if (processor := LogitsProcessor.of(tasks[i].sampling, tasks[i].tokens, mask)) is not None:
            processors[i] = processor
    decided: dict[int, list[int]] = {i: [] for i in starts}
    failures: dict[int, Exception] = {}
    open_tasks = [i for i in starts if not _ended(tasks[i], choices[i])]
    while open_tasks:
        forced = {i: processors[i].only for i in open_tasks if i in processors}
        # Forced tokens need no logits, and copying a row takes longer than a choice.
        by_logits = [i for i in open_tasks if forced.get(i) is None]
        rows = [starts[i] + len(choices[i]) - certain[i] for i in by_logits]
        for i, row in zip(by_logits, rows, strict=True):
            decided[i].append(row)
        wanted = [
            ChoiceRow(
                row, tasks[i].sampling, len(tasks[i].tokens) + len(choices[i]), tasks[i].prompt_len, processors.get(i)
            )
            for i, row in zip(by_logits, rows, strict=True)
        ]
        tokens = {**forced, **dict(zip(by_logits, _chosen(output, wanted), strict=True))}
        for i in open_tasks:
            token = tokens[i]
            assert token is not None
            if isinstance(token, Exception):
                failures[i] = token
                continue
            choices[i].append(token)
            if i in processors:
                processors[i].push(token)
        open_tasks = [
            i
            for i in open_tasks
            if i not in failures
            and len(choices[i]) <= len(chains[i].tokens)
            and chains[i].tokens[len(choices[i]) - 1] == choices[i][-1]
            # Behind the end of the text, rules and grammar may allow no token.
            and not (i in processors and _ended(tasks[i], choices[i]))
        ]
    return choices, decided, failures


def _chosen(output: TargetOutput, rows: Sequence[ChoiceRow]) -> Sequence[int | Exception]:
    """Return the choice of each row, or the error of one that has none."""
    try:
        return output.choose(rows) if rows else []
    except FAILURES as error:
        return [error] if len(rows) == 1 else [one for row in rows for one in _chosen(output, [row])]


def _ended(task: VerifyTask, choices: Sequence[int]) -> bool:
    return bool(choices) and choices[-1] in task.stop_ids
