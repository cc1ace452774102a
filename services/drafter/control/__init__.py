"""The speculation controller: how many tokens to draft, and how likely each is accepted. Pure: no I/O, no clock."""

from services.drafter.control.controller import Controller, Round, RuleName, SessionControl, Step
from services.drafter.control.guess import Guess
from services.drafter.control.times import Pace
from services.drafter.control.weights import ControlWeights

__all__ = [
    "ControlWeights",
    "Controller",
    "Guess",
    "Pace",
    "Round",
    "RuleName",
    "SessionControl",
    "Step",
    "features",
    "records",
    "rules",
    "times",
    "weights",
]
