"""The gateway's certificate, read again when it is renewed: connections that are made later get the new one."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

from shared.errors import SettingsError
from shared.runtime import logging
from shared.runtime.tls import load_chain, server_context

LOOK_S = 5.0
"""Time between two looks at the files."""
PREFIX = "https"


class Certificate:
    """A certificate and its key in files. New files that cannot be used leave the old ones in force."""

    def __init__(self, cert_file: Path, key_file: Path | None) -> None:
        """Raises SettingsError when the files cannot be used now."""
        self._cert_file, self._key_file = cert_file, key_file
        self._seen = self._state()
        self.context: ssl.SSLContext = server_context(cert_file, key_file, PREFIX)

    def factory(self, _config: object, _default: object) -> ssl.SSLContext:
        """As uvicorn asks for it."""
        return self.context

    async def watch(self) -> None:
        """Take the files again whenever they change, for ever."""
        log = logging.get()
        while True:
            await asyncio.sleep(LOOK_S)
            state = self._state()
            if state == self._seen:
                continue
            try:
                # In a context of its own first: one that took half of a new pair would serve nobody.
                server_context(self._cert_file, self._key_file, PREFIX)
                load_chain(self.context, self._cert_file, self._key_file, PREFIX)
            except SettingsError as error:
                log.error("certificate not read: the one of before stays in force", error=str(error))
            else:
                log.info("certificate read", file=str(self._cert_file))
            self._seen = state

    def _state(self) -> list[tuple[int, int, int] | None]:
        state: list[tuple[int, int, int] | None] = []
        for path in (self._cert_file, self._key_file or self._cert_file):
            try:
                about = path.stat()
                state.append((about.st_ino, about.st_mtime_ns, about.st_size))
            except OSError:
                state.append(None)
        return state
