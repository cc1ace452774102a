"""Draft sources: `registry` lists them by name; this package holds those that compute with a model."""

from services.drafter.core.draft import Draft, DraftAhead, DraftRequest, DraftSource, NoDrafts, Prediction, States
from services.drafter.core.lookup import LookupDrafts

__all__ = [
    "Draft",
    "DraftAhead",
    "DraftRequest",
    "DraftSource",
    "LookupDrafts",
    "NoDrafts",
    "Prediction",
    "States",
    "hidden",
    "model",
    "pairing",
    "registry",
    "statistics",
    "translated",
    "twin",
]
