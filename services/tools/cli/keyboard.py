"""Reads the messages of a conversation from the terminal or from a file."""

from __future__ import annotations

import select
import sys

from services.tools.cli.core.text_parts import printable
from shared.errors import WispError

PASTED_S = 0.05
"""Lines that arrive this soon after another were pasted with it. For terminals without bracketed paste."""


def read_message(prompt: str) -> str:
    """Return the next message: the text up to the Enter key, or several lines if they are pasted at once.

    From a file or a pipe, each line is a message. Where standard input or output is no terminal, the message is printed
    after its prompt, so that the output has the whole conversation. Raises EOFError at the end, and WispError for a
    file that is not UTF-8.
    """
    bracketed = _edit_lines()
    echoed = not (_is_terminal() and sys.stdout.isatty())
    while True:
        try:
            message = _unechoed(prompt) if echoed else input(prompt)
            if not bracketed and _is_terminal():
                message = "\n".join([message, *_pasted_lines()])
            message.encode()  # in the locale C, Python reads other bytes as surrogates
        except UnicodeError:
            if not _is_terminal():
                raise WispError("the input is not UTF-8 text") from None
            print("  the typed text is not UTF-8", file=sys.stderr)
        except RuntimeError:  # standard input is closed
            raise EOFError from None
        else:
            if echoed and message:
                print(printable(prompt + message))
            return message


def _unechoed(prompt: str) -> str:
    """Return the next line. A keyboard gets its prompt on standard error."""
    if _is_terminal():
        print(prompt, end="", file=sys.stderr, flush=True)
    return input()


def _edit_lines() -> bool:
    """Give `input` line editing and history. Return whether a paste of several lines arrives as one."""
    try:
        import readline
    except ImportError:
        return False
    if "libedit" in (readline.__doc__ or ""):
        return False
    # Python switches it off for its own prompt, which takes one line at a time.
    readline.parse_and_bind("set enable-bracketed-paste on")
    return True


def _pasted_lines() -> list[str]:
    """Return the lines that have arrived together with the last one."""
    lines = []
    while select.select([sys.stdin], [], [], PASTED_S)[0]:
        try:
            lines.append(input())
        except EOFError:
            break
    return lines


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()
