"""Fixtures for all tests: private brokers for the whole run, and a namespace per test."""

from __future__ import annotations

import gc
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator, Generator
from secrets import token_hex
from typing import Any

import hypothesis
import pytest
import structlog
from groups import group_of, place_of

# Set before torch or numpy is loaded: their waiting threads must not take the cores from what is under test.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Set before Triton is loaded, where it is installed: kernels for GPUs are computed by its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")

from services.tools.local.brokers import Brokers
from services.tools.local.folder import RunFolder

# Keep bytecode even where the environment forbids it: hundreds of processes start during the tests, and each would
# compile all of the source again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A busy machine takes longer over the same example: no test of properties is about time.
hypothesis.settings.register_profile("wisp", deadline=None)
hypothesis.settings.register_profile("fast", deadline=None, max_examples=25)  # of `make test-fast`
hypothesis.settings.load_profile("wisp")

# structlog's default prints a traceback with the local variables of each frame, which takes seconds. The services set
# plain ones, as here (`shared.runtime.logging`).
structlog.configure(
    processors=[
        *structlog.get_config()["processors"][:-1],
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback),
    ]
)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect without garbage collection, and leave what collection loaded out of it during the tests.

    Torch and transformers alone create a million objects that live until the end; to search them for garbage again and
    again takes seconds.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests that use the default target as `big_model`; let workers begin with the longest groups."""
    for item in items:
        if "target_folder" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.big_model)
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: place_of(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Spread the tests over the workers by their groups.

    `--dist loadgroup` of pytest-xdist 3.8 puts groups into the ids of tests, which pytest 9.2 ignores.
    """
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return GroupScheduling(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print with `--durations` how long each worker and each long group took, so that groups stay balanced."""
    if terminalreporter.config.getoption("durations") is None:
        return
    seconds: Counter[str] = Counter()
    for report in (one for reports in terminalreporter.stats.values() for one in reports):
        if isinstance(report, pytest.TestReport):
            seconds[group_of(report.nodeid)] += report.duration
            seconds[f"worker {getattr(report, 'worker_id', 'main')}"] += report.duration
    terminalreporter.section("seconds by worker and group")
    for name, spent_s in seconds.most_common():
        if spent_s >= 20:
            terminalreporter.line(f"{spent_s:7.0f} s  {name}")


@pytest.fixture(scope="session")
async def brokers() -> AsyncIterator[Brokers]:
    """RabbitMQ and Redis of this worker; given ones if WISP_AMQP_URL and WISP_REDIS_URL are set."""
    with RunFolder("test") as folder:
        async with Brokers(folder.path) as running:
            yield running


@pytest.fixture(scope="session")
def amqp_url(brokers: Brokers) -> str:
    """RabbitMQ's address."""
    return brokers.amqp_url


@pytest.fixture(scope="session")
def redis_url(brokers: Brokers) -> str:
    """Redis's address."""
    return brokers.redis_url


@pytest.fixture
def namespace() -> str:
    """A prefix for one test's exchange, queues and keys."""
    return f"test-{token_hex(4)}"
