"""Draft sources: `registry` lists them by name; this package holds those that compute with a model."""

from services.drafter.core.draft import (
    AheadRequest,
    Draft,
    DraftRequest,
    DraftSource,
    NoDrafts,
    Prediction,
    PreparedDraft,
    States,
)
from services.drafter.core.lookup import LookupDrafts

__all__ = [
    "AheadRequest",
    "Draft",
    "DraftRequest",
    "DraftSource",
    "LookupDrafts",
    "NoDrafts",
    "Prediction",
    "PreparedDraft",
    "States",
    "hidden",
    "model",
    "pairing",
    "registry",
    "statistics",
    "translated",
    "twin",
]
