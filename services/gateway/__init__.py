"""The gateway: the OpenAI HTTP API, admission, streaming and resuming."""

__all__ = ["app", "backend", "core", "errors", "guard", "ledger", "metrics", "server", "session", "settings", "stream"]
