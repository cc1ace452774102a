"""The speculation controller: how many tokens to draft, and how likely each is to be accepted."""

from services.drafter.control.controller import Controller, Round, RuleName, SessionControl, Step
from services.drafter.control.guess import Guess
from services.drafter.control.pace import Pace
from services.drafter.control.weights import ControlWeights, load_weights

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
    "load_weights",
    "pace",
    "rounds",
    "rules",
    "weights",
]
