"""Programs around twins: `wisp calibrate` measures a target profile, `wisp trace` records texts and drafts."""

__all__ = ["calibrate", "fitting", "random_model", "traces"]
