"""Options of the load benchmark that others leave without effect are refused, not ignored."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from services.tools.bench.load import __main__ as load
from services.tools.bench.load.__main__ import IGNORED_BY_CROSSOVER


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    """The command; nothing is measured."""

    def measure(*_: object) -> None:
        raise AssertionError("the measurement has begun")

    monkeypatch.setattr(load, "let_idle_threads_sleep", measure)
    made = typer.Typer()
    made.command()(load.main)
    return made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--acceptance 0.6", "--acceptance of a twin: name its --target-profile"),
        ("--trace smollm2-135m", "--trace of a twin: name its --target-profile"),
        ("--target-profile a100-qwen3-32b --acceptance 0.6 --trace smollm2-135m", "leave --acceptance or --trace out"),
        ("--crossover --arms wisp --search", "leave --arms, --search out"),
        ("--crossover --workload x.toml --requests y.jsonl", "leave --workload, --requests out"),
        ("--crossover --target-profile a100-qwen3-32b", "leave --target-profile out"),
        ("--crossover --measure 5", "leave --measure out"),
    ],
)
def test_options_without_an_effect_are_refused(app: typer.Typer, options: str, message: str) -> None:
    done = CliRunner().invoke(app, options.split())
    assert done.exit_code != 0
    assert not isinstance(done.exception, AssertionError)
    assert message in " ".join(done.output.split())


@pytest.mark.parametrize(
    "options",
    ["", "--crossover --sessions 1,2 --seed 3", "--target-profile a100-qwen3-32b --acceptance 0.6 --arms wisp"],
)
def test_options_with_an_effect_are_accepted(app: typer.Typer, options: str) -> None:
    done = CliRunner().invoke(app, options.split())
    assert isinstance(done.exception, AssertionError)


def test_every_option_that_the_crossover_ignores_exists(app: typer.Typer) -> None:
    names = {option.name for option in typer.main.get_command(app).params}
    assert set(IGNORED_BY_CROSSOVER) <= names
