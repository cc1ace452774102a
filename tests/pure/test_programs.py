"""Programs behind `wisp bench` and `wisp chaos`."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.tools.bench.support.options import run_program
from services.tools.cli.main import Benchmark, app

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


def test_the_help_of_bench_has_a_line_for_each_benchmark() -> None:
    shown = CliRunner().invoke(app, ["bench", "--help"])
    assert shown.exit_code == 0
    words = " ".join(shown.output.split())
    for benchmark in Benchmark:
        assert len(benchmark.summary) > 20
        assert f"{benchmark.value} {benchmark.summary}" in words
