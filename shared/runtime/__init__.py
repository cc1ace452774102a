"""What every service process has: settings, logs, health, tasks, TLS."""

__all__ = ["health", "logging", "service", "settings", "tls"]
