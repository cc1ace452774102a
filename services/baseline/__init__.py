"""The baselines: centralized and colocated serving, without messages between services. See `service`."""

__all__ = ["core", "settings"]
