"""The baselines: serving in one place, without messages between services. `service` says how and why."""

__all__ = ["settings"]
