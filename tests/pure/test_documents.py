"""Every page names commands, options, targets, settings, files and functions that exist; every link leads somewhere."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import pytest
import typer
from pages import LONGEST_LINE, PLACEHOLDER, ROOT, Command, Page, commands_of, pages
from pydantic_settings import BaseSettings

from services.tools.cli.main import app

MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
MOST_README_LINES = 200
UsageError: type[Exception] = typer.BadParameter.__mro__[1]
PAGES = pytest.mark.parametrize("page", [pytest.param(page, id=str(page.path.relative_to(ROOT))) for page in pages()])


class Launched(Exception):
    """Raised in place of starting another program."""


@PAGES
def test_commands_exist_and_parse(page: Page) -> None:
    assert problems_of_commands(page) == []


@PAGES
def test_links_and_anchors_resolve(page: Page) -> None:
    assert problems_of_links(page) == []


@PAGES
def test_settings_exist(page: Page) -> None:
    assert problems_of_settings(page) == []


@PAGES
def test_lines_of_prose_are_short(page: Page) -> None:
    assert page.long_lines == []


def test_the_readme_is_short() -> None:
    lines = Page(ROOT / "README.md").text.splitlines()
    assert len(lines) <= MOST_README_LINES
    assert max(map(len, lines)) <= LONGEST_LINE


@PAGES
def test_named_files_and_functions_exist(page: Page) -> None:
    assert problems_of_sources(page) == []


def test_every_phony_target_has_a_recipe() -> None:
    assert phony_targets() - targets_with_recipes() == set()


def test_every_target_with_a_recipe_is_phony() -> None:
    assert targets_with_recipes() - phony_targets() == set()


def test_make_help_lists_every_described_target() -> None:
    described = set(re.findall(r"^([\w-]+):.*## ", MAKEFILE, re.MULTILINE))
    assert set(re.findall(r"^  ([\w-]+) ", made("help"), re.MULTILINE)) == described


@pytest.mark.parametrize(
    ("wanted", "near"), [("dem", "; did you mean demo?"), ("tset-fast", "test-fast?"), ("xyz", ".")]
)
def test_make_names_the_target_near_a_misspelt_one(wanted: str, near: str) -> None:
    with pytest.raises(ValueError, match="there is no target") as refused:
        made(wanted)
    assert f"there is no target {wanted}" in str(refused.value)
    assert f"{near} `make help` lists them." in str(refused.value)


@pytest.mark.parametrize("target", sorted(re.findall(r"^(?:bench-[\w-]+|chaos)(?=:)", MAKEFILE, re.MULTILINE)))
def test_targets_of_benchmarks_start_their_benchmark(target: str) -> None:
    started = [
        command for command in recipe(target) if command.words[0].endswith("/wisp") and "models" not in command.words
    ]
    assert [command.words[1:] for command in started] == [tuple(target.split("-"))]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("`wisp nothing`", "no command"),
        ("`wisp keys nothing`", "no command"),
        ("`wisp up --nothing`", "--nothing"),
        ("```sh\nwisp keys new\n```", "Missing argument"),
        ("```sh\nX=1 .venv/bin/wisp up --port high | tee log\n```", "high"),
        ("`wisp bench nothing`", "nothing"),
        ("`wisp bench scheduler --nothing`", "--nothing"),
        ("`wisp device --nothing x`", "--nothing"),
        ("`make nothing`", "no target"),
        ("`make serve NOTHING=1`", "NOTHING"),
        ('`make bench-scheduler ARGS="--nothing"`', "--nothing"),
        ("`python -m services.nothing`", "no program"),
        ("`python -m services.verifier --nothing 1`", "--nothing"),
    ],
)
def test_a_wrong_command_is_reported(text: str, problem: str) -> None:
    found = problems_of_commands(Page(ROOT / "page.md", text))
    assert len(found) == 1
    assert problem in found[0]


@pytest.mark.parametrize(
    "text",
    [
        "`wisp`, `wisp keys`, `wisp keys revoke`, `wisp replay --policy edf`, `wisp-services`, `wisp bench …`",
        "```sh\nA=b wisp up --port 0 > log 2>&1 &  # in a terminal\nmake serve PORT=9000 && wisp keys list\n```",
        "```json\n{'wisp': {\n```",
    ],
)
def test_right_commands_are_not_reported(text: str) -> None:
    assert problems_of_commands(Page(ROOT / "page.md", text)) == []


def test_wrong_links_are_reported() -> None:
    page = Page(ROOT / "page.md", "# One\n[a](#one) [b](#two) [c](README.md) [d](gone.md) [e](README.md#gone)")
    assert problems_of_links(page) == ["#two", "gone.md", "README.md#gone"]


def test_unknown_settings_are_reported() -> None:
    page = Page(ROOT / "page.md", "`WISP_POLICY`, `WISP_HTTPS_…`, `WISP_NOTHING`, `WISP_NOTHING_…`, `WISP_POLIC`")
    assert problems_of_settings(page) == ["WISP_NOTHING", "WISP_NOTHING_", "WISP_POLIC"]


def test_missing_files_and_functions_are_reported() -> None:
    page = Page(
        ROOT / "page.md",
        "`services/gone.py`, `shared/errors.py`, `shared/errors.py: WispError, Gone`, `errors.py`, `gone.py`, "
        "`tests/pages.py: Page.links`, `tests/pages.py: Page.gone`\n```\nshared/gone.lua\n```",
    )
    assert problems_of_sources(page) == [
        "services/gone.py",
        "shared/errors.py: Gone",
        "gone.py",
        "tests/pages.py: Page.gone",
        "shared/gone.lua",
    ]


def problems_of_commands(page: Page) -> list[str]:
    """The page's `make`, `wisp` and `python -m` commands that do not exist or do not parse."""
    found = []
    for command in page.commands:
        try:
            check(command)
        except (UsageError, ValueError) as error:
            message = error.format_message() if isinstance(error, UsageError) else str(error)
            found.append(f"{command}: {message}")
    return found


def check(command: Command) -> None:
    """Raise UsageError or ValueError for a command of ours that does not exist or does not parse."""
    program, *arguments = command.words
    whole = command.whole
    if PLACEHOLDER in arguments:
        whole, arguments = False, arguments[: arguments.index(PLACEHOLDER)]
    match Path(program).name:
        case "make":
            check_make(arguments)
        case "wisp":
            check_wisp(arguments, whole)
        case "python" | "python3" if len(arguments) > 1 and arguments[0] == "-m" and PLACEHOLDER not in arguments[1]:
            if arguments[1].split(".")[0] in ("services", "shared"):
                check_program(arguments[1], arguments[2:], whole)


def check_make(arguments: list[str]) -> None:
    """Check targets and variables, and the `wisp` commands that the recipe runs with these variables."""
    known = set(re.findall(r"^([A-Z_]+) *[?:]?=", MAKEFILE, re.MULTILINE))
    for word in arguments:
        variable, is_assignment, _ = word.partition("=")
        if is_assignment and variable not in known:
            raise ValueError(f"the Makefile has no variable {variable}")
        if not is_assignment and word not in targets_with_recipes():
            raise ValueError(f"the Makefile has no target {word} with a recipe")
    for command in recipe(*arguments):
        if Path(command.words[0]).name == "wisp":
            check(command)


def check_wisp(arguments: list[str], whole: bool) -> None:
    """Parse a command's arguments as `wisp` does, without running the command."""
    command = wisp()
    path = ["wisp"]
    while hasattr(command, "commands"):
        if not arguments or arguments == ["--help"]:
            return
        path.append(arguments[0])
        if arguments[0] not in command.commands:
            raise ValueError(f"no command `{' '.join(path)}`")
        command, arguments = command.commands[arguments[0]], arguments[1:]
    context = parsed(command, " ".join(path), arguments, whole)
    if context is not None and command.context_settings.get("ignore_unknown_options"):
        # The command hands its arguments to another program, which parses them.
        with patch.object(os, "execv", side_effect=Launched) as launch, pytest.raises(Launched):
            command.invoke(context)
        _, (_, _, module, *rest) = launch.call_args.args
        check_program(module, rest, whole)


@cache
def wisp() -> Any:
    """The commands of `wisp`, whose signatures take a tenth of a second to read."""
    return typer.main.get_command(app)


def check_program(module: str, arguments: list[str], whole: bool) -> None:
    """Parse the arguments of `python -m MODULE` as it does, without running it."""
    try:
        is_package = importlib.util.find_spec(f"{module}.__main__") is not None
    except ModuleNotFoundError:
        is_package = False
    if not is_package and importlib.util.find_spec(module) is None:
        raise ValueError(f"no program {module}")
    if (settings := settings_of(module)) is not None:
        options = {f"--{name.replace('_', '-')}" for name in settings.model_fields} | {"--help"}
        named = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        if unknown := named - options:
            raise ValueError(f"{module} has no option {', '.join(sorted(unknown))}")
        return
    main = getattr(importlib.import_module(f"{module}.__main__" if is_package else module), "main", None)
    if main is None:
        raise ValueError(f"{module} is no program")
    rest = arguments[1:] if arguments[:1] == ["--"] else arguments
    if inspect.signature(main).parameters:
        program = typer.Typer(add_completion=False)
        program.command()(main)
        parsed(typer.main.get_command(program), module, rest, whole)
    else:
        parsed_by_argparse(main, module, rest)


def parsed(command: Any, name: str, arguments: list[str], whole: bool) -> Any:
    """The context of a typer command with these arguments; None where it is not whole, or only asks for help.

    Files that the arguments name need not exist.
    """
    try:
        return command.make_context(name, list(arguments))
    except typer.Exit:
        return None
    except UsageError as error:
        message = error.format_message()  # type: ignore[attr-defined]
        missing_argument = message.startswith("Missing ") or message.endswith("requires an argument.")
        missing_file = message.endswith("does not exist.")
        if (missing_argument and not whole) or missing_file:
            return None
        raise


def parsed_by_argparse(main: Any, module: str, arguments: list[str]) -> None:
    """Let a program parse these arguments, and stop it there."""
    original = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        original(parser, arguments)
        raise Launched

    def refuse(_: argparse.ArgumentParser, message: str) -> NoReturn:
        raise ValueError(message)

    with (
        patch.object(argparse.ArgumentParser, "parse_args", parse_and_stop),
        patch.object(argparse.ArgumentParser, "error", refuse),
        patch.object(sys, "argv", [module, *arguments]),
        pytest.raises((Launched, SystemExit)),
    ):
        main()


def problems_of_links(page: Page) -> list[str]:
    """The page's links within the repository that lead nowhere."""
    found = []
    for link in page.links:
        if re.match(r"[a-z][a-z+.-]*:", link):
            continue
        path, _, anchor = link.partition("#")
        if not path:
            if anchor not in page.anchors:
                found.append(link)
            continue
        target = ROOT / path[1:] if path.startswith("/") else page.path.parent / path
        if not target.exists() or (anchor and anchor not in Page(target).anchors):
            found.append(link)
    return found


def problems_of_settings(page: Page) -> list[str]:
    """The page's environment variables that nothing reads."""
    known = settings_names() | deployment_variables()
    return sorted(
        name
        for name in page.variables
        if name not in known and not (name.endswith("_") and any(one.startswith(name) for one in known))
    )


@cache
def settings_names() -> frozenset[str]:
    """Environment variables of all settings classes."""
    for path in sorted(ROOT.glob("services/**/settings.py")):
        importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))

    def below(kind: type[BaseSettings]) -> Iterator[type[BaseSettings]]:
        for one in kind.__subclasses__():
            yield one
            yield from below(one)

    return frozenset(
        f"{kind.model_config.get('env_prefix', '')}{name}".upper()
        for kind in below(BaseSettings)
        for name in kind.model_fields
    )


@cache
def deployment_variables() -> frozenset[str]:
    """Environment variables that the Makefile, scripts and files for containers read."""
    files = [ROOT / "Makefile", *(ROOT / "docker").iterdir(), *(ROOT / ".ci").iterdir()]
    return frozenset(
        name
        for path in files
        if path.is_file()
        for name in re.findall(r"\$\{?(WISP_[A-Z0-9_]+)", path.read_text("utf-8"))
    )


def settings_of(module: str) -> Any:
    """The settings class of a service's program; None for other programs."""
    if not (ROOT / module.replace(".", "/") / "settings.py").is_file() or module.startswith("services.tools."):
        return None
    settings = importlib.import_module(f"{module}.settings")
    own = [
        kind
        for kind in vars(settings).values()
        if inspect.isclass(kind) and issubclass(kind, BaseSettings) and kind.__module__ == settings.__name__
    ]
    return own[-1]


def problems_of_sources(page: Page) -> list[str]:
    """The source files, and names in them, that the page mentions and that do not exist."""
    found = []
    for source in page.sources:
        path = file_of(source.path, page)
        if path is None:
            found.append(source.path)
        elif path.suffix == ".py":
            found += [f"{source.path}: {name}" for name in source.names if name not in names_in(path)]
    return found


def file_of(path: str, page: Page) -> Path | None:
    """The file of a path from the root or from the page's folder; a mere name may be anywhere."""
    for folder in (ROOT, page.path.parent):
        if (folder / path).is_file():
            return folder / path
    if "/" in path:
        return None
    return next(
        (one for top in ("services", "shared", "tests", "docker", "k8s") for one in (ROOT / top).rglob(path)), None
    )


@cache
def names_in(path: Path) -> frozenset[str]:
    """A module's functions, classes, `Class.method`s and constants."""

    def names(body: list[ast.stmt], prefix: str) -> Iterator[str]:
        for node in body:
            match node:
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                    yield prefix + name
                case ast.ClassDef(name=name, body=members):
                    yield prefix + name
                    yield from names(members, f"{prefix}{name}.")
                case ast.Assign(targets=targets):
                    yield from (prefix + one.id for one in targets if isinstance(one, ast.Name))
                case ast.AnnAssign(target=ast.Name(id=name)):
                    yield prefix + name

    return frozenset(names(ast.parse(path.read_text("utf-8")).body, ""))


def phony_targets() -> set[str]:
    return {name for line in re.findall(r"^\.PHONY:(.*)$", MAKEFILE, re.MULTILINE) for name in line.split()}


@cache
def targets_with_recipes() -> frozenset[str]:
    return frozenset(re.findall(r"^([a-z][\w-]*):[^\n]*\n\t", MAKEFILE, re.MULTILINE))


def recipe(*arguments: str) -> Iterator[Command]:
    """The commands that make would run. The Python is given, as looking for one takes longer than all else."""
    for line in made("-n", f"PYTHON={sys.executable}", *arguments).replace("\\\n", " ").splitlines():
        yield from commands_of(line, whole=True)


@cache
def made(*arguments: str) -> str:
    """Output of `make` with these arguments, without those of the `make` that runs the tests."""
    outer = ("MAKE", "MFLAGS", "ARGS", "PORT")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
    done = subprocess.run(
        ["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode:
        raise ValueError(done.stderr.strip())
    return done.stdout
