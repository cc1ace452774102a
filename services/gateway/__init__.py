"""The gateway: the OpenAI-compatible HTTP API, admission, streaming and resuming."""

__all__ = ["app", "browsers", "errors", "gateway", "keys", "model", "server", "settings", "stream"]
