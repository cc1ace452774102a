"""`wisp doctor`: checks each part that a stack needs and gives advice on what is missing."""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import platform
import re
import shutil
import sys
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from services.tools.cli.doctor_servers import check_apis, check_brokers, check_fleet
from services.tools.cli.findings import Finding, State, short
from services.tools.local.folder import running_apis, state_folder
from services.tools.local.machine import inspect_machine
from services.tools.local.ports import LOOPBACK, is_free
from services.tools.local.service_commands import cores
from services.tools.local.settings import BrokerAddresses, LocalSettings
from services.tools.local.target import models_folder
from shared.errors import ModelError

EXTRAS = {
    "gateway": ("fastapi", "uvicorn", "h11", "jinja2", "tokenizers", "llguidance"),
    "model": ("torch", "transformers", "safetensors", "gguf", "numba", "llvmlite"),
    "client": ("openai",),
    "device": ("httpx",),
    "training": ("scipy",),
    "bench": ("matplotlib",),
    "simulator": ("simpy", "matplotlib"),
}
"""The packages that show that an extra is installed."""
OPTIONAL = {"otel": ("opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http"), "gpu": ("triton",)}
"""Distributions of extras that only some users need: they are listed where they are installed."""
API_PORT = 8000
CHECK_S = 60.0
"""Longest time of a check. On a quiet machine all of them take a few seconds."""
MEMORY_NEEDED = 2.0
DISK_NEEDED = 1.0
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")


async def check_machine(begins: Callable[[str], None] = lambda name: None) -> list[Finding]:
    """Check every part. begins: gets the name of each check before it runs."""
    addresses = BrokerAddresses()

    async def brokers() -> list[Finding]:
        findings = await check_brokers(addresses, inspect_machine())
        usable.update(one.part for one in findings if one.state != "missing")
        return findings

    async def fleet() -> list[Finding]:
        return await check_fleet(addresses) if usable == {"RabbitMQ", "Redis"} else []

    usable: set[str] = set()
    found: list[Finding] = []
    for name, check in (
        ("Python", _in_thread(_python)),
        ("packages", _in_thread(_extras)),
        ("torch", _in_thread(_torch)),
        ("RabbitMQ and Redis", brokers),
        ("running suites", _in_thread(check_apis)),
        ("drafters and verifiers", fleet),
        ("models", _in_thread(_models)),
        ("draft", _in_thread(_drafts)),
        ("port", _in_thread(_port)),
        ("memory and disk", _in_thread(_resources)),
    ):
        begins(name)
        found += await _limited(name, check)
    return found


async def _limited(name: str, check: Callable[[], Awaitable[list[Finding]]]) -> list[Finding]:
    """Return a check's findings, or after `CHECK_S` that it has not ended."""
    try:
        async with asyncio.timeout(CHECK_S):
            return await check()
    except TimeoutError:
        return [
            Finding(
                name,
                "missing",
                f"this check has not ended within {CHECK_S:g} s",
                "the machine, its disk or a server may be too busy: try again when it is not",
            )
        ]


def _in_thread(check: Callable[[], Iterable[Finding]]) -> Callable[[], Awaitable[list[Finding]]]:
    """Return a check that runs in a thread of its own. The process does not wait for one that hangs."""

    async def run() -> list[Finding]:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[list[Finding]] = loop.create_future()

        def settle(found: list[Finding], error: BaseException | None) -> None:
            if ended.done():
                return
            if error is None:
                ended.set_result(found)
            else:
                ended.set_exception(error)

        def work() -> None:
            try:
                found, error = list(check()), None
            except Exception as raised:
                found, error = [], raised
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(settle, found, error)

        threading.Thread(target=work, daemon=True).start()
        return await ended

    return run


def _python() -> Iterator[Finding]:
    # Older versions cannot import this module.
    yield Finding("Python", "ok", f"{platform.python_version()} in {short(Path(sys.prefix))}")


def _extras() -> Iterator[Finding]:
    for extra, packages in EXTRAS.items():
        lacking = [name for name in packages if importlib.util.find_spec(name) is None]
        part = f"packages: {extra}"
        if lacking:
            yield Finding(
                part,
                "missing",
                f"{', '.join(lacking)} not installed",
                f"type: make setup, or: pip install 'wisp[{extra}]'",
            )
        else:
            yield _installed(part, packages)
    for extra, packages in OPTIONAL.items():
        with suppress(importlib.metadata.PackageNotFoundError):
            yield _installed(f"packages: {extra}", packages)


def _installed(part: str, packages: Sequence[str]) -> Finding:
    return Finding(part, "ok", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages))


def _torch() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    flags = sorted(_cpu_flags() & set(INSTRUCTIONS), key=INSTRUCTIONS.index)
    capability = torch.backends.cpu.get_cpu_capability()
    yield Finding("torch", "ok", f"{torch.__version__}, kernels for {capability}, CPU has {', '.join(flags) or 'none'}")
    if torch.cuda.is_available():
        yield Finding("GPU", "ok", torch.cuda.get_device_name(0))
    elif not {"amx_bf16", "avx512_bf16", "bf16"} & set(flags):
        yield Finding(
            "bfloat16",
            "note",
            "this CPU has no instructions for it",
            "models that run as compiled code need none; if another verifies slowly, try float32 (WISP_DTYPE=float32)",
        )
    missing = {"avx2", "fma"} - _cpu_flags() if platform.machine() == "x86_64" else set()
    if missing:
        yield Finding(
            "kernels",
            "note",
            f"this CPU lacks {', '.join(sorted(missing))}: compiled code is right, but many times slower",
            "run verifiers and drafters on a CPU with AVX2",
        )


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return set(found.group(1).split()) if found else set()


def _models() -> Iterator[Finding]:
    if importlib.util.find_spec("tokenizers") is None:
        return
    from shared.models.folder import AUTO, ModelFolder
    from shared.models.prepare import PACKAGED, validate

    wanted = LocalSettings().target
    if wanted not in PACKAGED:
        yield _named_target(wanted)
    for name, packaged in PACKAGED.items():
        folder = models_folder() / name
        try:
            if folder.is_dir():
                model = ModelFolder(folder)
                validate(model)
                yield Finding(f"model {name}", "ok", f"{short(folder)} (fingerprint {model.fingerprint(AUTO)[:12]})")
                continue
            packaged.locate()
        except ModelError as error:
            state: State = "missing" if name == wanted else "note"
            yield Finding(f"model {name}", state, str(error), "type: make setup, or: wisp models prepare")
        else:
            yield Finding(
                f"model {name}",
                "note",
                "packaged, not unpacked yet",
                "the first run unpacks it; or type: wisp models prepare",
            )


def _named_target(target: str) -> Finding:
    """Check the target that WISP_TARGET names beside the packaged models."""
    from shared.models.folder import ModelFolder
    from shared.models.gguf_file import is_gguf
    from shared.models.prepare import validate
    from shared.twin.folder import TwinFolder
    from shared.twin.layout import is_twin

    part, path = "target", Path(target)
    try:
        if is_gguf(path):
            return Finding(part, "ok", f"{short(path)}, which the first run converts")
        if is_twin(path):
            TwinFolder.open(path)
        else:
            validate(ModelFolder(path))
    except ModelError as error:
        return Finding(part, "missing", str(error), "WISP_TARGET names it: name another, or unset WISP_TARGET")
    return Finding(part, "ok", f"{short(path)}, which WISP_TARGET names")


def _drafts() -> Iterator[Finding]:
    """Check whether the target has a draft model."""
    if importlib.util.find_spec("tokenizers") is None:
        return
    from services.drafter.hidden.card import shipped_for
    from shared.models.folder import ModelFolder
    from shared.models.prepare import PACKAGED
    from shared.twin.layout import is_twin

    wanted = LocalSettings().target
    folder = models_folder() / wanted if wanted in PACKAGED else Path(wanted)
    if is_twin(folder):
        return  # it has drafts of its own
    try:
        target = ModelFolder(folder)
        found = shipped_for(target)
    except ModelError:
        return  # reported with the model
    if found is None:
        yield Finding(
            "draft", "note", f"none for {target.name}: drafts come from lookup", "`wisp draft train` makes one"
        )
    else:
        yield Finding("draft", "ok", f"{short(found.path)} for {found.card.target}")


def _port() -> Iterator[Finding]:
    if is_free(LOOPBACK, API_PORT):
        yield Finding("port", "ok", f"{API_PORT} is free on {LOOPBACK}")
    elif API_PORT in (api.port for api in running_apis()):
        yield Finding("port", "ok", f"{API_PORT} is that of the suite that runs here")
    else:
        yield Finding(
            "port", "note", f"{API_PORT} is in use on {LOOPBACK}", f"choose another: make serve PORT={API_PORT + 1}"
        )


def _resources() -> Iterator[Finding]:
    memory = psutil.virtual_memory().available / 2**30
    yield Finding(
        "memory",
        "ok" if memory >= MEMORY_NEEDED else "note",
        f"{memory:.1f} GiB available, {cores()} CPU cores",
        ""
        if memory >= MEMORY_NEEDED
        else f"the default model's stack needs about {MEMORY_NEEDED:.0f} GiB: close other programs",
    )
    state = state_folder()
    disk = shutil.disk_usage(state if state.is_dir() else state.parent).free / 2**30
    yield Finding(
        "disk",
        "ok" if disk >= DISK_NEEDED else "note",
        f"{disk:.1f} GiB free at {short(state.parent)}",
        "" if disk >= DISK_NEEDED else f"the model and the logs need {DISK_NEEDED:.0f} GiB: free some space",
    )
