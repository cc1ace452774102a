"""Commands against hostile servers and odd terminals: one line of error, no control characters, no traceback."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import typer
from rich.console import Console
from rich.text import Text
from typer.testing import CliRunner, Result

from services.tools.cli import chat
from services.tools.cli.main import app
from services.tools.cli.suite_address import SuiteAddress
from services.tools.cli.suite_observer import observed
from services.tools.cli.terminal import SafeConsole, errors_shown, print_fields
from services.tools.local import folder
from services.tools.local.ports import free_ports
from shared.broker.client import CONNECT_TIMEOUT_S
from shared.errors import BrokersError

pytestmark = pytest.mark.slow  # a process of each command

ROOT = Path(__file__).parents[2]
WISP = [sys.executable, "-c", "from services.tools.cli.main import app; app()"]
HOSTILE = "x\x1b]0;owned\x07\x1b[2J\x9b31m\x00y"
"""Sets the title of a terminal, clears it and makes it red."""
SHOWN = "x]0;owned[2J31my"
MODELS = {"object": "list", "data": [{"id": "model", "object": "model", "created": 1, "owned_by": "x"}]}
TYPES = {"html": "text/html; charset=utf-8", "json": "application/json", "sse": "text/event-stream"}


def chunk(**fields: object) -> bytes:
    body = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", **fields}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def said(text: object) -> bytes:
    return chunk(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": "stop"}])


Reply = tuple[int, str, bytes]
KEYS: list[str] = []
"""The authorization of each POST."""


HELLO: Reply = 200, "sse", said("hello") + b"data: [DONE]\n\n"


@contextmanager
def server(models: Reply, answer: Reply = HELLO) -> Iterator[str]:
    """A server with these answers to GET and POST; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(models)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            KEYS.append(self.headers["authorization"])
            self.reply(answer)

        def reply(self, reply: Reply) -> None:
            status, kind, body = reply
            self.send_response(status)
            self.send_header("content-type", TYPES[kind])
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, args=[0.01], daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}/v1"
    finally:
        running.shutdown()
        running.server_close()


def wisp(*words: str, given: str = "hi\n", **environment: str) -> Result:
    result = CliRunner().invoke(app, list(words), input=given, env=environment)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert not {"\x1b", "\x07", "\x9b", "\x00"} & set(result.output)
    return result


def as_json(fields: object) -> Reply:
    return 200, "json", json.dumps(fields).encode()


def refused(result: Result) -> str:
    """The only line of error."""
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("command", ["chat", "demo"])
@pytest.mark.parametrize(
    "models",
    [
        (200, "html", b"<!doctype html><title>Welcome to nginx</title>"),
        (404, "html", b"<html>\n<body>not here</body>\n</html>"),
        (500, "json", json.dumps({"error": {"message": HOSTILE + "\nmore"}}).encode()),
        (200, "json", b"{"),
        as_json({}),
        as_json([1]),
        as_json({"data": []}),
        as_json({"data": ["model"]}),
        as_json({"data": [{"id": None}]}),
        as_json({"data": [{"id": ""}]}),
        (200, "json", b'{"data": [{"id": "\xff"}]}'),
    ],
)
def test_a_server_that_is_no_gateway_is_one_line_of_error(command: str, models: Reply) -> None:
    with server(models) as url:
        line = refused(wisp(command, "--url", url))
    assert url in line
    assert "answers, but" in line


@pytest.mark.parametrize("command", ["chat", "demo"])
@pytest.mark.parametrize(
    "answer",
    [
        (200, "html", b"<!doctype html>"),
        (200, "sse", b"data: {\n\n"),
        (200, "sse", b'data: "text"\n\n'),
        (200, "sse", said({"not": "text"})),
        (200, "sse", chunk(choices=7)),
        (200, "sse", chunk(choices=[], wisp={"tokens": [{"id": "a"}]})),
        (200, "sse", chunk(choices=[], wisp={"summary": {"rounds": "many"}})),
        (200, "sse", chunk(choices=[], wisp={"summary": {"rounds": 1}})),
        (200, "sse", b"data: \xff\xfe\n\n"),
    ],
)
def test_an_answer_that_is_no_completion_is_one_line_of_error(command: str, answer: Reply) -> None:
    with server(as_json(MODELS), answer) as url:
        assert "OpenAI API" in refused(wisp(command, "--url", url))


def test_a_demonstration_needs_the_measurements_of_a_gateway() -> None:
    with server(as_json(MODELS)) as url:
        assert "answers without measurements" in refused(wisp("demo", "--url", url))


def test_control_characters_of_a_server_never_reach_the_terminal() -> None:
    models = as_json({"object": "list", "data": [{"id": HOSTILE, "object": "model"}]})
    with server(models, (200, "sse", said(HOSTILE) + b"data: [DONE]\n\n")) as url:
        shown = wisp("chat", "--url", url).stdout
    assert shown.count(SHOWN) == 2
    failure = (400, "json", json.dumps({"error": {"message": HOSTILE}}).encode())
    with server(models, failure) as url:
        assert SHOWN in wisp("chat", "--url", url).stdout.partition("error: ")[2]
    with server(failure) as url:
        assert SHOWN in refused(wisp("demo", "--url", url))


def test_the_console_writes_only_its_own_styles() -> None:
    console = SafeConsole(file=io.StringIO(), force_terminal=True, color_system="standard", width=60)
    console.print(Text(HOSTILE, "red"))
    console.print_json(json.dumps({"name": HOSTILE}))
    console.print("a surrogate: \udc80")
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert not {"\x07", "\x9b", "\x00", "\udc80"} & set(written)
    assert f"\x1b[31m{SHOWN}\x1b[0m" in written
    assert "\x1b]" not in written
    assert "\x1b[2J" not in written


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_logs_hold_no_control_characters_of_others(log_format: str) -> None:
    script = f"""
import logging as standard
from shared.runtime import logging
logging.configure("device", "kitchen", "info", {log_format!r})
logging.get().error("refused", error={HOSTILE!r})
standard.getLogger("library").error({HOSTILE!r})
"""
    logged = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, timeout=60, check=True)
    text = logged.stderr.decode()
    assert text.count("owned") == 2
    assert not {"\x07", "\x9b", "\x00"} & set(text)
    assert "\x1b]" not in text
    assert "\x1b[2J" not in text


LOGGING = """
from shared.runtime import logging
logging.configure("device", "kitchen", "info", "auto")
logging.get().info("ready", session="s-1")
"""


def test_logs_are_json_where_no_terminal_shows_them() -> None:
    logged = subprocess.run([sys.executable, "-c", LOGGING], cwd=ROOT, capture_output=True, timeout=60, check=True)
    entry = json.loads(logged.stderr)
    assert entry.pop("timestamp").endswith("Z")
    assert entry == {
        "service": "device", "instance": "kitchen", "session": "s-1", "event": "ready", "level": "info",
    }  # fmt: skip


@pytest.mark.parametrize("colour", [True, False])
def test_logs_in_a_terminal_are_short_and_coloured(colour: bool) -> None:
    ours, theirs = pty.openpty()
    env = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | (
        {} if colour else {"NO_COLOR": "1"}
    )
    subprocess.run([sys.executable, "-c", LOGGING], cwd=ROOT, stderr=theirs, env=env, timeout=60, check=True)
    os.close(theirs)
    text = os.read(ours, 10_000).decode()
    os.close(ours)
    assert ("\x1b[" in text) == colour
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text).rstrip()
    assert re.fullmatch(r"\d\d:\d\d:\d\d \[info *\] ready +instance=kitchen service=device session=s-1", plain), plain


def test_json_has_the_same_content_without_control_characters() -> None:
    console = SafeConsole(file=io.StringIO(), force_terminal=False)
    print_fields(console, {"name": HOSTILE, "more": "caf\u00e9 \x7f \x85 \udc80"})
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert "caf\u00e9" in written
    assert not {"\x1b", "\x9b", "\x7f", "\x85"} & set(written)
    assert json.loads(written) == {"name": HOSTILE, "more": "caf\u00e9 \x7f \x85 \udc80"}


@pytest.mark.parametrize("name", ["WISP_API_KEY", "OPENAI_API_KEY"])
def test_an_empty_key_is_no_key_and_a_broken_one_is_named(name: str) -> None:
    with server(as_json(MODELS)) as url:
        assert "hello" in wisp("chat", "--url", url, **{name: ""}).stdout
        for broken in ("two\nlines", "caf\u00e9", "a b"):
            assert "the API key" in refused(wisp("chat", "--url", url, **{name: broken}))


@pytest.mark.parametrize("url", ["", "nonsense", "ftp://host/v1", "http://", "http://[", "http://ho st/v1"])
@pytest.mark.parametrize("command", ["chat", "demo"])
def test_a_url_that_is_none_is_one_line_of_error(command: str, url: str) -> None:
    refused(wisp(command, "--url", url))


def test_a_proxy_that_is_none_is_one_line_of_error() -> None:
    assert "proxy" in refused(wisp("chat", "--url", "http://127.0.0.1:1/v1", HTTP_PROXY="nonsense://x")).lower()


def test_text_that_is_not_utf8_is_one_line_of_error() -> None:
    with server(as_json(MODELS)) as url:
        ended = command("chat", "--url", url, given=b"hello\n\xff\n")
    assert ended.returncode == 1
    assert b"hello" in ended.stdout
    assert ended.stderr.startswith(b"error: the input is not UTF-8 text")
    assert len(ended.stderr.splitlines()) == 1


def command(*words: str, given: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*WISP, *words],
        input=given,
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    "words",
    [["top", "--once"], ["top", "--json"], ["replay"], ["journal", "export", "/dev/null"], ["journal", "delete"]],
)
def test_a_missing_broker_is_one_line_of_error_at_once(words: list[str]) -> None:
    (port,) = free_ports(1)
    started = time.monotonic()
    ended = command(*words, "--namespace", "nosuch", "--amqp-url", f"amqp://ann:hidden@127.0.0.1:{port}/")
    assert time.monotonic() - started < CONNECT_TIMEOUT_S, "it is not tried again and again, as by a service"
    assert ended.returncode == 1
    assert ended.stdout == b""
    (line,) = ended.stderr.decode().splitlines()
    assert line.startswith(f"error: RabbitMQ cannot be used at amqp://127.0.0.1:{port}/")


async def test_a_missing_suite_is_reported_before_its_broker() -> None:
    (port,) = free_ports(1)
    absent = SuiteAddress(f"amqp://127.0.0.1:{port}/", "wisp", absent="no suite runs on this machine")
    with pytest.raises(
        BrokersError, match=r"^no suite runs on this machine; start one with `wisp up`, or .*: RabbitMQ cannot be used"
    ):
        await observed(absent, 1.0)


@pytest.mark.parametrize("words", [["--help"], ["settings", "gateway"], ["models", "list"]])
def test_a_reader_that_has_left_ends_a_command_quietly(words: list[str]) -> None:
    left, writing = os.pipe()
    os.close(left)
    with os.fdopen(writing, "wb") as nobody:
        ended = subprocess.run(
            [*WISP, *words], stdout=nobody, stderr=subprocess.PIPE, cwd=ROOT, timeout=60, check=False
        )
    assert (ended.returncode, ended.stderr) == (1, b"")


def test_a_full_disk_is_one_line_of_error() -> None:
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(
            [*WISP, "models", "list"], stdout=full, stderr=subprocess.PIPE, cwd=ROOT, timeout=60, check=False
        )
    assert ended.returncode == 1
    assert ended.stderr == b"error: [Errno 28] No space left on device\n"


def test_an_error_of_tasks_that_ran_together_is_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    refused = ExceptionGroup("tasks", [ExceptionGroup("more", [BrokersError("no broker")]), BrokersError("no broker")])
    with pytest.raises(typer.Exit), errors_shown():
        raise refused
    assert capsys.readouterr().err == "error: no broker\n"


def test_an_error_of_the_system_in_a_task_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), errors_shown():
        raise ExceptionGroup("tasks", [OSError(28, "No space left on device", "/full/file")])
    assert capsys.readouterr().err == "error: /full/file: No space left on device\n"


def test_a_fault_beside_an_error_keeps_its_traceback() -> None:
    with pytest.raises(ExceptionGroup, match="tasks"), errors_shown():
        raise ExceptionGroup("tasks", [BrokersError("no broker"), KeyError("x")])


def test_the_version_is_that_of_the_package() -> None:
    assert wisp("--version").stdout == f"wisp {importlib.metadata.version('wisp')}\n"


def test_an_interrupt_ends_a_command_with_its_own_status() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        asking = subprocess.Popen([*WISP, "chat", "--url", url], cwd=ROOT, stderr=subprocess.PIPE)
        silent.settimeout(60)
        connection, _ = silent.accept()
        with connection:
            assert connection.recv(1024).startswith(b"GET /v1/models")
            asking.send_signal(signal.SIGINT)
            _, shown = asking.communicate(timeout=60)
    assert (asking.returncode, shown) == (130, b"interrupted\n")


@pytest.fixture
def noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a run of `wisp up` in a state folder of its own."""
    monkeypatch.setattr(folder, "state_folder", lambda: tmp_path)
    with folder.RunFolder("up") as run:
        yield run.path


def test_a_chat_uses_the_suite_that_runs_here_and_its_key(noted: Path) -> None:
    with server(as_json(MODELS)) as url:
        folder.note_api(noted, folder.RunningApi(url, 1))
        shown = wisp("chat", "--key", "wisp-secret", given="hi\n").stdout
        assert KEYS[-1] == "Bearer wisp-secret"
    assert f"Using the suite at {url}\n" in shown
    assert shown.endswith("\n\n> hi\nhello\n")


def test_a_chat_names_the_choice_between_two_suites(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [folder.RunningApi("http://new/v1", 1), folder.RunningApi("http://old/v1", 1)]
    monkeypatch.setattr(chat, "running_apis", lambda: both)
    shown = io.StringIO()
    assert chat.running_suite(Console(file=shown)) == "http://new/v1"
    assert shown.getvalue() == "Using the suite at http://new/v1, the latest of 2 (--url takes another)\n"


def test_a_chat_with_a_model_of_its_own_uses_no_running_suite(noted: Path) -> None:
    folder.note_api(noted, folder.RunningApi("http://127.0.0.1:1/v1", 1))
    assert "no-such-model is neither" in refused(wisp("chat", "--target", "no-such-model"))


def test_a_conversation_in_a_file_has_messages_answers_and_nothing_else() -> None:
    with server(as_json(MODELS)) as url:
        ended = command("chat", "--url", url, given=b"one\n\n/reset\ntwo")
    first, *lines = ended.stdout.decode().splitlines()
    assert first.startswith("Chat with model: ")
    assert first.endswith("/help lists commands.")
    assert lines == ["", "> one", "hello", "", "> /reset", "  new conversation", "", "> two", "hello"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_work_that_cleans_up(number: signal.Signals, tmp_path: Path) -> None:
    """Also work that waits for the keyboard, and a second signal meanwhile."""
    script = f"""
import os, signal
from services.tools.cli.terminal import stopped_by_signals
with stopped_by_signals():
    try:
        print("> ", end="", flush=True)
        input()
    finally:
        os.kill(os.getpid(), {number.value})
        print("cleaned")
"""
    waiting = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert waiting.stdout is not None
    assert waiting.stdout.read(2) == b"> "
    waiting.send_signal(number)
    shown, _ = waiting.communicate(timeout=60)
    assert (waiting.returncode, shown) == (143, b"cleaned\n")


READ = """
from services.tools.cli.keyboard import read_message
while True:
    try:
        print("got", repr(read_message("> ")), flush=True)
    except EOFError:
        break
"""


def typed(keys: bytes, script: str = READ) -> str:
    """The output of a script in a terminal in which these keys are pressed, and then Ctrl-D."""
    child, terminal = pty.fork()
    if not child:
        os.execve(sys.executable, [sys.executable, "-c", script], {**os.environ, "TERM": "xterm"})
    shown = b""
    while b"> " not in shown:
        shown += os.read(terminal, 1024)
    os.write(terminal, keys)
    time.sleep(0.5)
    os.write(terminal, b"\x04")
    try:
        while more := os.read(terminal, 1024):
            shown += more
    except OSError:  # the end of a terminal on Linux
        pass
    os.close(terminal)
    assert os.waitpid(child, 0)[1] == 0
    return shown.decode()


def test_pasted_lines_are_one_message() -> None:
    shown = typed(b"\x1b[200~one\rtwo\r\rthree\x1b[201~\rfour\r")
    assert [line.strip() for line in shown.splitlines() if line.startswith("got")] == [
        r"got 'one\ntwo\n\nthree'",
        "got 'four'",
    ]


def test_pasted_lines_are_one_message_without_bracketed_paste() -> None:
    shown = typed(b"one\ntwo\nthree\n", "import sys; sys.modules['readline'] = None" + READ)
    assert [line.strip() for line in shown.splitlines() if line.startswith("got")] == [r"got 'one\ntwo\nthree'"]
