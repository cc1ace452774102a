"""The one error of `shared.models` that is a caller's fault and not a fault of the model's files."""

from __future__ import annotations

from shared.errors import ModelError


class ChatTemplateError(ModelError):
    """The messages cannot be rendered with the model's chat template, or the model has none."""
