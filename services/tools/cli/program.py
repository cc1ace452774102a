"""Programs whose `--help` is short to read, and whose errors of options say what a right value is.

The options of a long command are in groups. A flag has no type in the help, and a range not the word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from shared.errors import in_words, quoted

Function = TypeVar("Function", bound=Callable[..., Any])
HELP = "Help"
"""Group of `--help` in a command whose options have groups. Each option names its group as its `rich_help_panel`."""


def shorten(parameters: Sequence[object]) -> None:
    """Take out of a command's help what says nothing: `<bool>` behind a flag, and `range` before a range.

    Groups are shown where each option has one. A short command that shares a grouped option keeps one list.
    """
    options = [one for one in parameters if isinstance(one, TyperOption)]
    grouped = all(one.rich_help_panel for one in options if one.name != "help")
    for one in options:
        if one.is_flag and one.metavar is None:
            one.metavar = ""
        if one.metavar is None and (one.min is not None or one.max is not None):
            one.metavar = f"<{one.bare_type()}>"
        if not grouped:
            one.rich_help_panel = None
        elif one.name == "help" and len(options) > 1:
            one.rich_help_panel = HELP


def explain(error: typer.BadParameter) -> None:
    """Put the error of a value into the form of other settings' errors: what is wrong, the value, an example."""
    cause, option = error.__cause__, error.param
    if cause is None or not hasattr(cause, "errors"):
        return
    problem = cause.errors()[0]
    if problem["type"] == "value_error":  # its words are the option's own
        error.message = in_words(problem)
        return
    error.message = f"{in_words(problem)} (given: {quoted(problem['input'])})"
    if isinstance(option, TyperOption) and option.type_descriptor.annotation in (int, float):
        lowest = 1 if option.min is None else option.min
        default = lowest if option.default is None else option.default
        error.message += f"; for example {max(option.opts, key=len)} {default}"


class ProgramCommand(TyperCommand):
    """A command of a `Program`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line."""
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            explain(error)
            raise

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        shorten(self.get_params(ctx))
        super().format_help(ctx, formatter)


class ProgramGroup(TyperGroup):
    """The commands of a `Program`."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        shorten(self.get_params(ctx))
        super().format_help(ctx, formatter)


class Program(typer.Typer):
    """A typer application with this project's form of help, and tracebacks as Python prints them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"cls": ProgramGroup, "add_completion": False, "pretty_exceptions_enable": False, **options})

    def command(
        self, name: str | None = None, *, cls: type[TyperCommand] | None = None, **options: Any
    ) -> Callable[[Function], Function]:
        """Register a command, as `typer.Typer.command` does."""
        return super().command(name, cls=cls or ProgramCommand, **options)
