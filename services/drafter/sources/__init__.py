"""Where drafts come from, behind one interface: `none`, `lookup`, `model`, `hidden`, and the last with lookup."""

from services.drafter.core.draft import Ahead, Draft, DraftRequest, DraftSource, NoDrafts, States
from services.drafter.core.lookup import LookupDrafts

__all__ = ["Ahead", "Draft", "DraftRequest", "DraftSource", "LookupDrafts", "NoDrafts", "States", "guesses", "hidden"]
