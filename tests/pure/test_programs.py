"""Programs behind `wisp bench` and `wisp chaos`."""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperGroup, TyperOption
from typer.testing import CliRunner

from services.tools.bench.support.options import run_program
from services.tools.cli.main import app
from services.tools.cli.other_programs import Benchmark
from services.tools.cli.program import Program

TOOLS = Path(__file__).parents[2] / "services/tools"


def test_the_usage_line_shows_what_users_type(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(seed: int = 0) -> None:
        raise AssertionError("only help is asked for")

    monkeypatch.setattr(sys, "argv", ["/somewhere/__main__.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        run_program(main, "wisp bench stream")
    assert ended.value.code == 0
    assert "Usage: wisp bench stream [OPTIONS]" in capsys.readouterr().out


@pytest.mark.parametrize("path", [*sorted((TOOLS / "bench").rglob("*.py")), TOOLS / "chaos/__main__.py"], ids=str)
def test_each_program_runs_under_its_own_name(path: Path) -> None:
    name = path.parent.name if path.name == "__main__.py" else path.stem
    others = {"chaos": "wisp chaos", "bundle": "make gpu-bundle"}
    expected = others.get(name, f"wisp bench {name}")
    for call in (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)):
        called = ast.unparse(call.func)
        assert called != "typer.run", "its usage line would say `python -m`"
        if called == "run_program":
            assert ast.unparse(call.args[1]) == repr(expected)


LONG = 14
"""Options from which a command's `--help` has to be in groups."""


def commands() -> Iterator[tuple[str, Any]]:
    """Yield the commands of `wisp` and those that run as programs of their own."""
    pending = [("wisp", typer.main.get_command(app))]
    while pending:
        name, command = pending.pop()
        if isinstance(command, TyperGroup):
            pending += [(f"{name} {below}", one) for below, one in command.commands.items()]
        else:
            yield name, command
    for module in ("bench.load.__main__", "bench.stream.__main__", "bench.gpu.__main__", "chaos.__main__"):
        program = Program()
        program.command()(import_module(f"services.tools.{module}").main)
        yield module, typer.main.get_command(program)
    yield "simulate", typer.main.get_command(import_module("services.tools.simulator.__main__").app)


def test_long_commands_group_their_options() -> None:
    long, without = set(), []
    for name, command in commands():
        options = [one for one in command.params if isinstance(one, TyperOption)]
        if len(options) >= LONG:
            long.add(name)
            without += [f"{name} --{one.name}" for one in options if not one.rich_help_panel]
    assert {"wisp up", "wisp replay", "bench.load.__main__", "simulate"} <= long
    assert without == []


def test_the_groups_stand_in_the_help_in_order_with_flags_without_a_type() -> None:
    shown = CliRunner().invoke(app, ["demo", "--help"], env={"COLUMNS": "100"}).output
    groups = re.findall(r"╭─ ([\w ]+) ─", shown)
    assert groups == ["API", "Model", "Processes", "Drafts", "Answers", "Help"]
    assert "<bool>" not in shown
    assert "range" not in shown


@pytest.mark.parametrize("words", [["--help"], ["--", "--help"], ["--sessions", "4", "--search"]])
def test_what_follows_a_benchmark_belongs_to_it(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(os, "execv", lambda program, call: calls.append(call))
    assert CliRunner().invoke(app, ["bench", "load", *words]).exit_code == 0
    given = [word for word in words if word != "--"]
    assert calls == [[sys.executable, "-m", "services.tools.bench.load", *given]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("up --port abc", "Invalid value for '--port': must be a whole number (given: 'abc'); for example --port 8000"),
        ("up --drafters -4", "must be 0 or more (given: '-4'); for example --drafters 1"),
        ("replay --speed fast", "must be a number (given: 'fast'); for example --speed 1.0"),
        ("replay --sessions 0", "must be 1 or more (given: '0'); for example --sessions 1"),
        ("up --dtype int3", "'int3' is not one of 'auto', 'bfloat16'"),
        ("bench loud", "there is no benchmark 'loud'; did you mean load?"),
        ("bench zzz", "there are draft, edits,"),
        ("dem", "Did you mean 'demo'?"),
    ],
)
def test_a_wrong_value_is_named_with_a_right_one(call: str, message: str) -> None:
    result = CliRunner().invoke(app, call.split(), env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", "").split())


def test_the_help_of_bench_has_a_line_for_each_benchmark() -> None:
    shown = CliRunner().invoke(app, ["bench", "--help"])
    assert shown.exit_code == 0
    words = " ".join(shown.output.split())
    for benchmark in Benchmark:
        assert len(benchmark.summary) > 20
        assert f"{benchmark.value} {benchmark.summary}" in words
