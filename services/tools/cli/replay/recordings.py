"""The recording that a command's options name, notes about it, and the text of its tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from rich.text import Text

from services.tools.cli.suite_address import SuiteAddress, choose_suite
from services.tools.cli.terminal import err, quiet_broker_client, run
from services.tools.local.folder import running_suites
from services.tools.local.progress import Progress
from services.tools.local.settings import BrokerAddresses, LocalSettings
from services.tools.local.target import prepare_target
from services.tools.replayer import files, journal
from services.tools.replayer.core.recording import Recording
from services.tools.replayer.times import parse_time_ms
from shared.errors import WispError
from shared.runtime import logging


def suite_address(namespace: str | None, amqp_url: str | None) -> SuiteAddress:
    """Return the suite that the options, the environment or this machine's runs name. Raises SettingsError."""
    quiet_broker_client()
    return choose_suite(
        amqp_url or BrokerAddresses().amqp_url, namespace or LocalSettings().namespace, running_suites()
    )


def load_recording(
    file: Path | None, since: str | None, until: str | None, namespace: str | None, amqp_url: str | None
) -> Recording:
    """Read a recording from a file or from a suite's journal. Raises RecordingError and SettingsError."""
    now_ms = time.time() * 1000
    since_ms = None if since is None else parse_time_ms(since, now_ms)
    until_ms = None if until is None else parse_time_ms(until, now_ms)
    if file is not None:
        return files.read(file).within(since_ms, until_ms)
    logging.configure("replay", "replay", "error", "console")
    suite = suite_address(namespace, amqp_url)
    return run(lambda: journal.read(suite.amqp_url, suite.namespace, since_ms)).within(None, until_ms)


def print_notes(recording: Recording) -> None:
    """Print what is missing from a recording."""
    notes = list(recording.notes)
    if recording.skipped:
        count = sum(recording.skipped.values())
        reason, _ = recording.skipped.most_common(1)[0]
        notes.append(f"{count} recorded messages are not WISP's and were skipped: {reason}")
    for note in notes:
        _print_note(note)


def token_texts(target: str | None, vocabularies: set[str], recording: Recording) -> Callable[[int], str]:
    """Return a function from token id to text; to `<id>` where the target's vocabulary is not available.

    vocabularies: fingerprints of the vocabularies in the recording.
    """
    if recording.redacted:
        return lambda _: "·"
    try:
        from shared.models.folder import ModelFolder
        from shared.models.text import Tokenizer

        folder = ModelFolder(prepare_target(target or LocalSettings().target, Progress()))
        if vocabularies - {folder.vocab_fingerprint}:
            raise WispError("the recorded model has another vocabulary")
        tokenizer = Tokenizer(folder)
    except (WispError, ImportError) as error:
        _print_note(f"tokens are shown as numbers: {error}; name the model with --target")
        return lambda token: f"<{token}>"
    control = {index: text for text, index in tokenizer.special_tokens.items()}
    return lambda token: control.get(token) or tokenizer.token_bytes(token).decode("utf-8", "replace")


def _print_note(note: str) -> None:
    err.print(Text.assemble(("note: ", "bold yellow"), note), soft_wrap=True)
