"""Acceptance and the choices around KV. Pure: no I/O, no clock."""

__all__ = ["acceptance", "replies", "tasks"]
