"""The private stack on this machine: brokers and services as processes."""

__all__ = [
    "background",
    "brokers",
    "folder",
    "forget",
    "host",
    "launch",
    "ports",
    "private",
    "probe",
    "process",
    "progress",
    "settings",
    "sources",
    "stack",
    "target",
]
