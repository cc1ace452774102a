"""Where drafts come from, behind one interface: `none`, `lookup`, `model`."""

from services.drafter.sources.base import Draft, DraftRequest, DraftSource, NoDrafts
from services.drafter.sources.lookup import LookupDrafts

__all__ = ["Draft", "DraftRequest", "DraftSource", "LookupDrafts", "NoDrafts"]
