"""Sources of a simulation's draft tokens, with the statistics that a stop rule reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from services.drafter.control import ControlWeights
from services.drafter.core.synthetic import WEIGHTS, DraftProcess, SyntheticToken
from shared.twin.spec import Acceptance


class DraftTokens(Protocol):
    """The draft tokens of one request, the same in any order and arm."""

    def token(self, position: int, ahead: int) -> SyntheticToken:
        """Return the token `ahead` tokens after the last committed one, in a round that begins at output `position`."""


class DraftModel(Protocol):
    """The draft model of all devices. Equal models draft the same tokens."""

    @property
    def weights(self) -> ControlWeights:
        """The acceptance models of its controllers."""

    def of_request(self, seed: int) -> DraftTokens:
        """Return the draft tokens of the request with this seed."""

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class SyntheticDrafts:
    """Random draft tokens with given chances to be accepted."""

    acceptance: Acceptance

    @property
    def weights(self) -> ControlWeights:
        """The acceptance model that takes a token's confidence for its acceptance."""
        return WEIGHTS

    def of_request(self, seed: int) -> DraftProcess:
        """Return the draft tokens of the request with this seed."""
        return DraftProcess(self.acceptance, seed)
