"""`wisp bench grammar`: cost of a JSON schema in a round of the verifier, against the same round without it.

The model first answers under the schema, and the benchmark records its logits. Then it verifies sessions that have
reached different positions of these answers in batches, with and without the grammar. The recorded logits replace the
forward pass. The difference of the times is the cost of the grammar: following the tokens, forcing, masks and choices.
The last row has random logits, so the likeliest token is nearly never allowed: each position needs its mask.

Times are CPU times of the thread, on which other programs have little effect. A pause of `PASS_S` represents the
forward pass. During it, another thread computes the masks that are likely to be needed; its time has a column of its
own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Annotated, Any, cast

import numpy as np
import torch
import typer

from services.tools.bench.support.options import run_program, target_folder, whole_numbers
from services.tools.bench.support.report import report, terminal
from services.tools.cli.shared_options import TargetOption
from services.tools.cli.terminal import errors_shown
from services.tools.local.progress import ConsoleProgress, Progress
from services.verifier.core.tasks import VerifyTask
from services.verifier.verify import verify
from shared.engine import Engine, Step
from shared.engine.engine import Output
from shared.errors import WispError
from shared.grammar import build
from shared.grammar.masks import Grammars
from shared.messages import Grammar, Sampling
from shared.models.folder import ModelFolder
from shared.models.text import Tokenizer
from shared.sampling.sampler import choose

AIM_MS, AIM_BATCH = 1.0, 32
RAISED = 1000.0
PASS_S = 0.01
"""Time of a forward pass of such a batch on an accelerator; on a CPU it takes longer."""
ANSWER = 160
"""Most tokens of a recorded answer."""
SUBJECTS = ("Ada Lovelace, who wrote programs", "Marie Curie, who studied radiation")
SAMPLINGS = {
    "greedy": Sampling(),
    "temperature 1": Sampling(temperature=1.0, seed=1),
    "temperature 0.7, top_p 0.9": Sampling(temperature=0.7, top_p=0.9, seed=1),
}
RANDOM = "greedy, random logits"
COLUMNS = [
    "sampling",
    "draft",
    "tokens a round",
    "without ms",
    "grammar's cost ms",
    "90 % ms",
    "beside the pass ms",
    "% of choices changed",
]


def schema() -> dict[str, Any]:
    """Return a schema of 2 KB: a person with addresses, jobs and preferences."""
    text = {"type": "string", "minLength": 1, "maxLength": 40}
    year = {"type": "integer", "minimum": 1800, "maximum": 2100}
    address = _object(
        street=text,
        number={"type": "integer", "minimum": 1, "maximum": 999},
        city=text,
        postal_code={"type": "string", "pattern": "^[0-9]{5}$"},
        country={"enum": ["France", "Germany", "Poland", "Spain", "United Kingdom", "United States"]},
    )
    job = _object(
        title=text,
        employer=text,
        began=year,
        ended={"anyOf": [year, {"type": "null"}]},
        skills={"type": "array", "items": text, "minItems": 1, "maxItems": 4},
    )
    return _object(
        name=text,
        born=year,
        email={"type": "string", "pattern": "^[a-z]{1,20}@[a-z]{1,20}[.](com|org)$"},
        nationality={"enum": ["British", "French", "German", "Polish", "Spanish", "American", "other"]},
        height_cm={"type": "number", "minimum": 50, "maximum": 250},
        alive={"type": "boolean"},
        home=address,
        work={"anyOf": [address, {"type": "null"}]},
        jobs={"type": "array", "items": job, "minItems": 1, "maxItems": 3},
        languages={"type": "array", "items": {"enum": ["en", "fr", "de", "pl", "es"]}, "minItems": 1, "maxItems": 3},
        summary={"type": "string", "minLength": 20, "maxLength": 300},
    )


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


@dataclass
class AnswerWithLogits:
    """A recorded answer and its logits."""

    prompt: list[int]
    tokens: list[int]
    logits: torch.Tensor
    """The row from which each token was chosen."""
    free_logits: torch.Tensor
    """The same rows with the token's own logit raised, so that it is chosen without the grammar too."""
    changed: float
    """Share of the tokens that the logits would not have chosen without the grammar."""

    @classmethod
    def of(cls, prompt: list[int], tokens: list[int], logits: torch.Tensor, sampling: Sampling) -> AnswerWithLogits:
        """Return an answer with its logits."""
        positions = range(len(prompt), len(prompt) + len(tokens))
        own = choose(logits, [sampling] * len(tokens), positions)
        raised = logits.clone()
        raised[range(len(tokens)), tokens] += RAISED
        changed = mean(one != token for one, token in zip(own, tokens, strict=True))
        return cls(prompt, tokens, logits, raised, changed)


@dataclass
class ReplayedLogits:
    """Replaces an engine: returns recorded logits. A session may begin at any position of an answer."""

    vocab_size: int
    max_len: int
    answers: dict[str, AnswerWithLogits] = field(default_factory=dict)
    """By session."""
    free: bool = False
    """True to return the logits that choose the same tokens without a grammar."""
    forward_s: float = 0.0
    """Time that went into copying rows."""
    keeps_hidden: bool = False
    _cached: dict[str, int] = field(default_factory=dict)

    def attach(self, session_id: str, tokens: Sequence[int]) -> int:
        """Return the number of cached tokens: all but the last."""
        self._cached[session_id] = len(tokens) - 1
        return len(tokens) - 1

    def truncate(self, session_id: str, length: int) -> None:
        """Drop the tokens from `length` on."""
        self._cached[session_id] = length

    def cached(self, session_id: str) -> int:
        """Return the length of a session."""
        return self._cached[session_id]

    def forward(self, steps: Sequence[Step]) -> Output:
        """Return the recorded rows at the sessions' positions."""
        began_s = time.thread_time()
        rows, offsets = [], [0]
        for step in steps:
            answer = self.answers[step.session_id]
            self._cached[step.session_id] += len(step.tokens)
            last = self._cached[step.session_id] - len(answer.prompt) + 1
            rows.append((answer.free_logits if self.free else answer.logits)[last - step.rows : last])
            offsets.append(offsets[-1] + step.rows)
        output = Output(torch.cat(rows), offsets)
        if not self.free:
            time.sleep(PASS_S)
        self.forward_s += time.thread_time() - began_s
        return output


def record_answers(engine: Engine, model: ModelFolder, grammar: str, sampling: Sampling) -> list[AnswerWithLogits]:
    """Let the model answer under a grammar, token by token. Raises WispError if an answer fails."""
    tokenizer, grammars = Tokenizer(model), Grammars.of(model)
    answers = []
    for number, subject in enumerate(SUBJECTS):
        text = f"Describe {subject}, as JSON with the fields {', '.join(schema()['properties'])}."
        prompt = tokenizer.render_chat([{"role": "user", "content": text}])
        ruled = sampling.model_copy(update={"grammar": Grammar(text=grammar, prompt_len=len(prompt))})
        tokens: list[int] = []
        rows: list[torch.Tensor] = []
        name = f"keep-{number}"
        engine.attach(name, prompt)
        while len(tokens) < ANSWER and not (tokens and tokens[-1] in model.eos_ids):
            whole = [*prompt, *tokens]
            task = _task(name, whole, [], ruled, len(prompt), model)
            (outcome,), _ = verify(engine, [task], grammars=grammars, most_forced=0)
            if outcome.verdict is None:
                raise outcome.error if isinstance(outcome.error, WispError) else WispError(str(outcome.error))
            # A forced token is committed without logits, so its row is computed here.
            engine.truncate(name, len(whole) - 1)
            rows.append(engine.forward([Step(name, whole[-1:], rows=1)]).logits.float())
            tokens += outcome.verdict.tokens
        engine.release(name)
        answers.append(AnswerWithLogits.of(prompt, tokens, torch.cat(rows), sampling))
    return answers


def _task(
    name: str, tokens: list[int], draft: list[int], sampling: Sampling, prompt_len: int, model: ModelFolder
) -> VerifyTask:
    stop_ids = frozenset(model.eos_ids)
    return VerifyTask(name, tokens, draft, sampling, stop_ids, room=100_000, prompt_len=prompt_len)


def measure(
    answers: Sequence[AnswerWithLogits],
    model: ModelFolder,
    grammar: str,
    sampling: Sampling,
    draft: int,
    batch: int,
    rounds: int,
) -> list[Any]:
    """Return tokens a round, time without the grammar, its cost at the median and the 90th percentile, the median time
    of masks beside the pass, and % changed.

    draft: tokens of each draft, all of which are accepted.
    """
    replayed = ReplayedLogits(answers[0].logits.shape[1], 1_000_000)
    engine = cast(Engine, replayed)
    grammars = Grammars.of(model)
    lengths = {f"s{i}": (i * 7) % ANSWER for i in range(batch)}
    generation = dict.fromkeys(lengths, 0)
    without_ms, cost_ms, beside_ms, made = [], [], [], []
    for number in range(rounds):
        tasks = []
        for index, (name, length) in enumerate(list(lengths.items())):
            answer = answers[index % len(answers)]
            if length >= len(answer.tokens) - draft - 1:
                lengths[name] = length = number % 3
                grammars.forget(f"{name}.{generation[name]}")
                generation[name] += 1
            session_id = f"{name}.{generation[name]}"
            replayed.answers[session_id] = answer
            ruled = sampling.model_copy(update={"grammar": Grammar(text=grammar, prompt_len=len(answer.prompt))})
            tokens = [*answer.prompt, *answer.tokens[:length]]
            ahead = answer.tokens[length : length + draft]
            # Forced tokens may not reach beyond the recorded rows.
            room = len(answer.tokens) - length
            tasks.append(replace(_task(session_id, tokens, ahead, ruled, len(answer.prompt), model), room=room))
        took_ms, ahead_ms, outcomes = _timed(replayed, engine, tasks, grammars)
        free = []
        for task, outcome in zip(tasks, outcomes, strict=True):
            assert outcome.verdict is not None, outcome.error
            name = task.session_id.partition(".")[0]
            lengths[name] += len(outcome.verdict.tokens)
            made.append(len(outcome.verdict.tokens))
            # The same rows without the grammar, with the forced tokens as drafts.
            free_sampling = task.sampling.model_copy(update={"grammar": None})
            free.append(replace(task, draft=outcome.verdict.tokens[:-1], sampling=free_sampling))
        free_ms, _, _ = _timed(replayed, engine, free, None)
        if number >= rounds // 10:  # the first rounds build the sessions' states
            without_ms.append(free_ms)
            cost_ms.append(took_ms - free_ms)
            beside_ms.append(ahead_ms)
    changed = 100 * mean(answer.changed for answer in answers)
    late_ms = quantiles(cost_ms, n=10)[8]
    return [mean(made), median(without_ms), median(cost_ms), late_ms, median(beside_ms), changed]


def _timed(
    replayed: ReplayedLogits, engine: Engine, tasks: list[VerifyTask], grammars: Grammars | None
) -> tuple[float, float, list[Any]]:
    """Verify a batch; return its time and that of other threads, in ms without `replayed`'s, and its outcomes."""
    replayed.forward_s, replayed.free = 0.0, grammars is None
    began_s, all_began_s = time.thread_time(), time.process_time()
    outcomes, _ = verify(engine, tasks, grammars=grammars)
    took_s = time.thread_time() - began_s
    others_s = time.process_time() - all_began_s - took_s
    return (took_s - replayed.forward_s) * 1000, others_s * 1000, outcomes


def main(
    batch: Annotated[int, typer.Option(min=1, help="Sessions in a batch.")] = AIM_BATCH,
    drafts: Annotated[str, typer.Option(help="Lengths of drafts, comma-separated.")] = "0,4",
    rounds: Annotated[int, typer.Option(min=20, help="Rounds of each row.")] = 100,
    target: TargetOption = None,
) -> None:
    """Measure the cost of a grammar in a round."""
    with errors_shown():
        progress = ConsoleProgress(terminal())
        model = ModelFolder(target_folder(target, progress))
        text = build.json_schema(schema())
        asked = whole_numbers("--drafts", drafts, 0)
        rows = _rows(model, text, asked, batch, rounds, progress)
        worst = max(row[4] for row in rows)
        verdict = "met" if worst <= AIM_MS else "missed"
        report(
            "grammar",
            "A JSON schema in a round",
            COLUMNS,
            rows,
            facts={"model": model.name, "schema bytes": len(json.dumps(schema())), "sessions": batch, "threads": 1},
            notes=[f"aim for {AIM_BATCH} sessions: {AIM_MS:g} ms at the median; {verdict} ({worst:.2f})"]
            if batch == AIM_BATCH
            else [],
        )


def _rows(
    model: ModelFolder, grammar: str, drafts: list[int], batch: int, rounds: int, progress: Progress
) -> list[list[Any]]:
    engine = Engine(Path(model.path), budget_tokens=2048)
    rows: list[list[Any]] = []
    answers: list[AnswerWithLogits] = []
    for name, sampling in SAMPLINGS.items():
        with progress.step(f"answers, {name}") as step:
            answers = record_answers(engine, model, grammar, sampling)
            step.done(f"answers, {name}: {sum(len(one.tokens) for one in answers)} tokens")
        rows += [[name, draft, *measure(answers, model, grammar, sampling, draft, batch, rounds)] for draft in drafts]
    draw = np.random.default_rng(0)
    noise = [torch.from_numpy(draw.normal(size=answer.logits.shape).astype(np.float32)) for answer in answers]
    random = [
        AnswerWithLogits.of(answer.prompt, answer.tokens, logits, Sampling())
        for answer, logits in zip(answers, noise, strict=True)
    ]
    rows.append([RANDOM, 0, *measure(random, model, grammar, Sampling(), 0, batch, rounds)])
    return rows


if __name__ == "__main__":
    run_program(main, "wisp bench grammar")
