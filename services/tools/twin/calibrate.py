"""`wisp calibrate`: measure the cost model of an architecture with our engine on this machine.

A model with random weights is made from a config.json. Batches of decoding, verification and prompts are computed over
numbers of jobs, new tokens and cached tokens, repeatedly until the time is up. The profile has the fitted
coefficients and the median time of each batch; `wisp simulate --set target=FILE` and `wisp up --target-profile FILE`
read it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.tools.bench.support.options import EngineThreadsOption, let_idle_threads_sleep, run_program, target_folder
from services.tools.bench.support.report import machine, table, terminal, written
from services.tools.cli.terminal import errors_shown
from services.tools.local.folder import state_folder
from services.tools.local.progress import ConsoleProgress, Progress, ProgressStep
from services.tools.twin.random_model import random_model, roomy_folder
from services.verifier.core.profile_plan import ProfileBatch, longest_ms
from shared import cost
from shared.cost.fit import VerifierFit
from shared.errors import EngineError, SettingsError
from shared.kernels.layout import BLOCK
from shared.messages import Measurement
from shared.models.folder import DTYPES
from shared.twin.files import load_target
from shared.twin.profile import MeasuredBatch, MeasuredProfile, parse_target

if TYPE_CHECKING:
    from shared.engine import Engine

MOST_SECONDS = 220.0
"""Longest time of the measurement; making the model comes on top."""
CAUTION = 1.3
"""A batch is started only if this multiple of its longest expected time is left."""
REPEATS = 15
"""Most measurements of a batch."""
JOBS = (1, 2, 4, 8, 16, 32, 64)
ROWS = (1, 5, 9)
CHUNKS = (32, 64, 128, 256, 512)
"""New tokens of a job: decoding, verification of drafts of 4 and 8 tokens, and chunks of a prompt."""
CONTEXTS = (64, 512, 2048, 8192)
CACHE_TOKENS = 32768
"""KV budget on a CPU, as in `wisp bench load`."""
MEMORY_SHARE, RESERVED_GB = 0.95, 2.0
"""Share of an accelerator's memory for weights and KV, less a reserve for activations: as in the shipped profiles."""


def batches_for(room: int, max_len: int) -> list[ProfileBatch]:
    """Return the batches that fit `room` tokens of KV and the model's context, those with the least work first."""
    found = []
    for context in CONTEXTS:
        kinds = [(jobs, rows, rows) for jobs in JOBS for rows in ROWS] + [(1, chunk, 0) for chunk in CHUNKS]
        for jobs, new, rows in kinds:
            blocks = -(-(context + new) // BLOCK)
            if context + new <= max_len and jobs * blocks * BLOCK <= room:
                found.append(ProfileBatch(jobs, new, rows, context))
    return sorted(found, key=lambda batch: (batch.jobs * batch.new, batch.jobs * batch.context))


class CostCalibration:
    """Measures batches in turn, each several times, and fits the cost model to their medians."""

    def __init__(self, batches: Sequence[ProfileBatch], seconds: float, earlier: Sequence[MeasuredBatch] = ()) -> None:
        """earlier: measurements of an earlier run, to which the new ones are added."""
        self._batches = batches
        self._seconds = seconds
        self.times = {batch_of(one): list(one.times_ms) for one in earlier}
        self._filling_s: dict[ProfileBatch, float] = {}
        """Time that each batch took to fill its context, the last time."""

    def run(self, engine: Engine, step: ProgressStep) -> None:
        """Measure until the time is up or every batch has `REPEATS` measurements. Raises SettingsError if none fits."""
        from services.verifier.profile import measure_batch

        if not self._batches:
            raise SettingsError("no batch fits the KV cache; raise --cache-tokens")
        started = time.perf_counter()
        measure_batch(engine, self._batches[0])  # a warm-up: loads code and touches memory
        for repeat in range(REPEATS):
            for number, batch in enumerate(self._batches):
                elapsed_s = time.perf_counter() - started
                expected_s = self._expected_s(batch) + self._expected_filling_s(batch)
                if elapsed_s + expected_s > self._seconds and self.times:
                    continue
                step.detail(
                    f"pass {repeat + 1}, batch {number + 1} of {len(self._batches)}: {batch.jobs} jobs of {batch.new} "
                    f"new tokens after {batch.context}; {elapsed_s:.0f} of at most {self._seconds:.0f} s"
                )
                took_ms = measure_batch(engine, batch)
                self._filling_s[batch] = time.perf_counter() - started - elapsed_s - took_ms / 1000
                self.times.setdefault(batch, []).append(took_ms)
            if time.perf_counter() - started > 0.95 * self._seconds:
                break

    def _expected_s(self, batch: ProfileBatch) -> float:
        """Return the longest expected time of a batch."""
        if batch in self.times:
            return CAUTION * max(self.times[batch]) / 1000
        measured = self.measurements
        if not measured:
            return 0.0
        shape = batch.shape
        model = self._fit().model()
        return CAUTION * longest_ms(shape, measured, model) / 1000

    def _expected_filling_s(self, batch: ProfileBatch) -> float:
        """Return the longest expected time to fill a batch's context: seconds where it is gigabytes of a GPU's KV."""
        if batch in self._filling_s:
            return self._filling_s[batch]
        rates = [seconds / (one.jobs * one.context) for one, seconds in self._filling_s.items()]
        return max(rates, default=0.0) * batch.jobs * batch.context

    @property
    def measurements(self) -> list[Measurement]:
        """The median of each batch."""
        return [Measurement(shape=batch.shape, measured_ms=median(times)) for batch, times in self.times.items()]

    def _fit(self) -> VerifierFit:
        fit = VerifierFit("calibration")
        fit.start_from(self.measurements)
        return fit

    def profile(self, description: str, facts: dict[str, Any], cache_tokens: int) -> MeasuredProfile:
        """Return the profile of the measurements so far."""
        model = self._fit().model()
        errors = sorted(abs(cost.predict_ms(model, one.shape) / one.measured_ms - 1) for one in self.measurements)
        return MeasuredProfile(
            description=description,
            kind="measured",
            facts=facts,
            cache_tokens=cache_tokens,
            coefficients=[float(f"{one:.6g}") for one in model.coefficients],
            knee=model.knee,
            error_p50=round(errors[len(errors) // 2], 4),
            error_p90=round(errors[9 * len(errors) // 10], 4),
            batches=[
                MeasuredBatch(
                    jobs=batch.jobs,
                    new=batch.new,
                    rows=batch.rows,
                    context=batch.context,
                    times_ms=[round(ms, 3) for ms in times],
                )
                for batch, times in self.times.items()
            ],
        )


def kv_tokens_of(torch_device: str, weights: int, weight_bytes: float, config: dict[str, Any]) -> int:
    """Return the KV budget of an accelerator: what its memory holds beside the weights. Raises EngineError."""
    import torch

    total = torch.cuda.get_device_properties(torch_device).total_memory
    heads = config.get("num_key_value_heads") or config.get("num_attention_heads")
    size = config.get("head_dim") or config.get("hidden_size", 0) // max(1, config.get("num_attention_heads", 1))
    layers = config.get("num_hidden_layers")
    if not (heads and size and layers):
        raise EngineError("config.json does not say how large a token's KV is; give --cache-tokens")
    free = total * MEMORY_SHARE - RESERVED_GB * 1e9 - weights * weight_bytes
    if free <= 0:
        raise EngineError(f"{weights / 1e9:.1f} billion weights leave no room for KV on {torch_device}")
    return int(free / (2 * layers * heads * size * 2))


def main(
    model: Annotated[
        str | None,
        typer.Argument(help="A config.json, a folder with one, or a packaged model. \\[default: the default target]"),
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"Format of the weights: {', '.join(DTYPES[:3])}.")] = "bfloat16",
    torch_device: Annotated[str, typer.Option("--device", help="torch device: cpu, cuda, cuda:1.")] = "cpu",
    threads: EngineThreadsOption = 1,
    cache_tokens: Annotated[
        int, typer.Option(min=0, help=f"KV budget in tokens; 0: {CACHE_TOKENS} on a CPU, else what the memory holds.")
    ] = 0,
    seconds: Annotated[float, typer.Option(min=1, max=MOST_SECONDS, help="Longest measurement.")] = 180.0,
    to: Annotated[
        Path | None, typer.Option("--out", help="File to write. \\[default: .wisp/profiles/MODEL-DEVICE.json]")
    ] = None,
    add: Annotated[
        Path | None,
        typer.Option("--add", help="Profile of an earlier run with the same options, whose times count too."),
    ] = None,
) -> None:
    """Measure the times of an architecture on this machine, with random weights, and write a target profile."""
    with errors_shown():
        if dtype not in DTYPES[:3]:
            raise SettingsError(f"--dtype {dtype}: random weights are made in {', '.join(DTYPES[:3])}")
        let_idle_threads_sleep()
        console = terminal()
        progress = ConsoleProgress(console)
        config, name = config_of(model, progress)
        earlier = None if add is None else load_target(str(add))
        if earlier is not None and not isinstance(earlier, MeasuredProfile):
            raise SettingsError(f"{add} was not measured by this command")
        profile = calibrate(config, name, dtype, torch_device, threads, cache_tokens, seconds, progress, earlier)
        console.print(table(profile.description, *rows_of(profile)))
        path = to or state_folder() / "profiles" / f"{name}-{torch_device.replace(':', '-')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(profile.model_dump_json(indent=1) + "\n", encoding="utf-8")
        parse_target(path.read_text(encoding="utf-8"), str(path))
        written(console, path)


def config_of(model: str | None, progress: Progress) -> tuple[Path, str]:
    """Return the config.json that the command names, and the model's name. Raises SettingsError."""
    given = Path(model) if model else None
    if given is not None and given.is_file() and given.suffix == ".json":
        return given, given.resolve().parent.name
    if given is not None and (given / "config.json").is_file():
        return given / "config.json", given.resolve().name
    folder = target_folder(model, progress)
    return folder / "config.json", folder.name


def calibrate(
    config: Path,
    name: str,
    dtype: str,
    torch_device: str,
    threads: int,
    cache_tokens: int,
    seconds: float,
    progress: Progress,
    earlier: MeasuredProfile | None = None,
) -> MeasuredProfile:
    """Measure an architecture, and return its profile. Raises WispError.

    earlier: a profile of the same model on the same machine, whose measurements count too.
    """
    from shared.engine import Engine

    facts = machine()
    used = threads or facts["cores"]
    with roomy_folder("wisp-calibrate-") as made:
        with progress.step(f"making {name} with random weights") as step:
            weights = random_model(config, made)
            step.done(f"{name} with {weights / 1e6:,.0f} million random weights")
        given = json.loads(config.read_text(encoding="utf-8"))
        on_cpu = torch_device == "cpu"
        bytes_each = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0}[dtype]
        room = cache_tokens or (CACHE_TOKENS if on_cpu else kv_tokens_of(torch_device, weights, bytes_each, given))
        with progress.step("loading it"):
            engine = Engine(made, dtype=dtype, device=torch_device, threads=used, budget_tokens=room)
    known = earlier.batches if earlier else []
    calibration = CostCalibration(batches_for(engine.free_tokens, engine.max_len), seconds, known)
    with progress.step("measuring") as step:
        calibration.run(engine, step)
        step.done(
            f"measured {len(calibration.times)} batches, {sum(map(len, calibration.times.values()))} times in all"
        )
    where = facts["processor"] if on_cpu else accelerator_name(torch_device)
    facts |= {
        "model": name, "model_type": given.get("model_type"), "weights": weights, "dtype": dtype,
        "torch_device": torch_device, "device": where, "threads": used, "arithmetic": engine.arithmetic,
        "module_code": engine.module_code_reason, "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip
    described = f"{name} in {dtype} on {where}" + (f", {used} thread{'s' * (used > 1)}" if on_cpu else "")
    return calibration.profile(described, facts, engine.budget_tokens)


def batch_of(one: MeasuredBatch) -> ProfileBatch:
    """Return the batch that was measured."""
    return ProfileBatch(one.jobs, one.new, one.rows, one.context)


def accelerator_name(torch_device: str) -> str:
    """Return the product name of an accelerator; other torch devices by their own name."""
    import torch

    return str(torch.cuda.get_device_name(torch_device)) if torch_device.startswith("cuda") else torch_device


def rows_of(profile: MeasuredProfile) -> tuple[list[str], list[list[Any]]]:
    """Return columns and rows of a table: measured against predicted times."""
    columns = ["jobs", "new tokens", "cached", "measured ms", "predicted ms", "times"]
    rows: list[list[Any]] = []
    for one in profile.batches:
        predicted_ms = profile.time_ms(batch_of(one).shape)
        rows.append([one.jobs, one.new, one.context, median(one.times_ms), predicted_ms, len(one.times_ms)])
    return columns, rows


if __name__ == "__main__":
    run_program(main, "wisp calibrate")
