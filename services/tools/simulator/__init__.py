"""Fleets in virtual time: the suite's own decisions on a target's cost model, without models, brokers or waiting."""

__all__ = ["arms", "core", "traced"]
