"""Fleets in virtual time: the suite's own deciding code on a target's cost model, without models or brokers."""

__all__ = ["arms", "core", "traced"]
