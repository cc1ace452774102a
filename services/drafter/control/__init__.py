"""The speculation controller: how many tokens to draft, and how likely each is accepted. Pure: no I/O, no clock."""

from services.drafter.control.calibration import Calibration
from services.drafter.control.controller import Controller, SessionControl
from services.drafter.control.draft_round import DraftDecision, DraftRound
from services.drafter.control.features import DraftToken
from services.drafter.control.rules import RuleName
from services.drafter.control.times import RoundTimes
from services.drafter.control.weights import ControlWeights

__all__ = [
    "Calibration",
    "ControlWeights",
    "Controller",
    "DraftDecision",
    "DraftRound",
    "DraftToken",
    "RoundTimes",
    "RuleName",
    "SessionControl",
    "features",
    "records",
    "rules",
    "times",
    "weights",
]
