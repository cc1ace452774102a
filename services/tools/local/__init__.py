"""A stack on this machine: private brokers, and the services as processes."""

__all__ = [
    "background",
    "broker_check",
    "broker_sources",
    "brokers",
    "folder",
    "machine",
    "namespace",
    "pieces",
    "ports",
    "process",
    "progress",
    "servers",
    "service_commands",
    "service_settings",
    "settings",
    "stack",
    "target",
]
