"""TLS contexts and options from certificate files. Certificates and host names are always checked."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import SettingsError


@dataclass(frozen=True)
class Tls:
    """TLS files of a client of RabbitMQ and Redis."""

    ca_file: Path | None = None
    """Authorities that server certificates are checked against; None for the system's."""
    cert_file: Path | None = None
    """Client certificate, with its intermediate certificates; None shows none."""
    key_file: Path | None = None

    def context(self) -> ssl.SSLContext:
        """Return the context for connections. Raises SettingsError when a file cannot be used."""
        context: ssl.SSLContext = _using(
            "tls_ca_file", self.ca_file, lambda: ssl.create_default_context(cafile=self.ca_file)
        )
        if self.cert_file is not None:
            load_chain(context, self.cert_file, self.key_file, "tls")
        return context

    def redis_options(self, url: str) -> dict[str, Any]:
        """Return the TLS arguments of `Redis.from_url` for this URL."""
        if not url.startswith("rediss:"):
            return {}
        files = {"ssl_ca_certs": self.ca_file, "ssl_certfile": self.cert_file, "ssl_keyfile": self.key_file}
        return {"ssl_check_hostname": True} | {name: str(file) for name, file in files.items() if file is not None}


def server_context(cert_file: Path, key_file: Path | None, prefix: str) -> ssl.SSLContext:
    """Return the context of a server with this certificate, for TLS 1.2 or later. Raises SettingsError."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    load_chain(context, cert_file, key_file, prefix)
    return context


def load_chain(context: ssl.SSLContext, cert_file: Path, key_file: Path | None, prefix: str) -> None:
    """Load a certificate and its key into a context. Raises a SettingsError that names `<prefix>_cert_file`."""

    def no_passphrase() -> str:
        raise SettingsError(f"{prefix}_key_file {key_file or cert_file}: the key has a passphrase; use one without")

    _using(
        f"{prefix}_cert_file and {prefix}_key_file",
        cert_file if key_file is None or not cert_file.is_file() else key_file,
        lambda: context.load_cert_chain(cert_file, key_file, no_passphrase),
    )


def bad_certificate(error: BaseException) -> str | None:
    """Return the problem of a server's certificate if it caused this error, else None."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    # The AMQP client raises errors again whose causes form a circle.
    while cause is not None and not any(cause is one for one in causes):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return cause.verify_message
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    return None


def _using(name: str, file: Path | None, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except ssl.SSLError as error:
        reason = (error.reason or str(error)).replace("_", " ").lower()
        raise SettingsError(f"{name} {file}: no PEM file, or certificate and key do not match ({reason})") from None
    except OSError as error:
        raise SettingsError(f"{name} {file}: {error.strerror or error}") from None
