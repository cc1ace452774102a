"""The engine's process: loads the models, then serves the API's process over a socket until that closes it."""

from __future__ import annotations

import gc
import select
import signal
import socket

from services.baseline.link import Frames, frame
from services.baseline.loop import EngineLoop
from services.baseline.settings import BaselineSettings
from services.drafter.drafting import load_drafting
from services.verifier.engine_thread import load_engine
from services.verifier.profile import profile
from shared.errors import WispError
from shared.grammar.masks import Grammars
from shared.messages import Cancel, Generate, Heartbeat
from shared.models.folder import ModelFolder
from shared.runtime import logging
from shared.twin.layout import is_twin

RECEIVED = 1 << 16


def run(settings: BaselineSettings, instance: str, link: socket.socket) -> None:
    """Serve until the other end of `link` is closed.

    Ends the process with status 1 for an error that needs the operator.
    """
    # Ctrl-C in a terminal reaches both processes. The API's process lets running requests end, then closes the link.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.configure("baseline", f"{instance}-engine", settings.log_level, settings.log_format)
    log = logging.get()
    try:
        _serve(settings, instance, link)
    except WispError as error:
        log.error("stopped", error=str(error))
        raise SystemExit(1) from None
    except (BrokenPipeError, ConnectionResetError):
        pass  # the API's process has ended
    except Exception:
        log.exception("crashed")
        raise SystemExit(1) from None


def _serve(settings: BaselineSettings, instance: str, link: socket.socket) -> None:
    log = logging.get()
    log.info("loading the models", folder=str(settings.target), dtype=settings.dtype, device=settings.device)
    drafting = load_drafting(settings) if settings.serving == "colocated" else None
    keep_hidden = drafting is not None and drafting.hidden_size > 0
    engine = load_engine(settings.target, settings, keep_hidden=keep_hidden)
    if engine.module_code_reason:
        log.warning(
            "the model is computed by transformers' module code, which is slower", reason=engine.module_code_reason
        )
    # As at a verifier's start, the profile's batches compile kernels and touch memory for the first time.
    profile(engine)
    loop = EngineLoop(
        engine,
        instance,
        drafting,
        grammars=None if is_twin(settings.target) else Grammars.of(ModelFolder(settings.target)),
        prefill_tokens=settings.prefill_tokens,
        max_running=settings.max_running,
    )
    gc.collect()
    gc.freeze()
    link.sendall(
        frame(
            Heartbeat(
                verifier=instance,
                fingerprint=ModelFolder(settings.target).fingerprint(settings.dtype),
                max_len=loop.longest_session,
                free_tokens=engine.free_tokens,
                total_tokens=engine.budget_tokens,
                arithmetic=engine.arithmetic,
            )
        )
    )
    frames = Frames()
    while True:
        while select.select([link], [], [], 0 if loop.busy else None)[0]:
            if not (data := link.recv(RECEIVED)):
                return
            for message in frames.feed(data):
                if isinstance(message, Generate) and (refused := loop.add(message)) is not None:
                    link.sendall(frame(refused))
                elif isinstance(message, Cancel):
                    loop.remove(message.session)
        if results := loop.step():
            link.sendall(b"".join(map(frame, results)))
