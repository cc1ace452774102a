"""Frame of every process: settings, logs, traces, health, tasks, TLS, files written by replacement."""

__all__ = ["files", "health", "logging", "service", "settings", "settings_loading", "tls", "tracing"]
