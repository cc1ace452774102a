"""Frame of every service process: settings, logs, health, tasks, TLS."""

__all__ = ["health", "logging", "service", "settings", "tls"]
