"""Pure: acceptance, replies to a batch, and the estimates around KV and emulation."""

__all__ = ["acceptance", "profile_plan", "replies", "runs", "tasks"]
