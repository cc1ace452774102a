"""The shape of a batch in the making. Pure.

The same five numbers as `BatchShape`, but changed in place: a decision asks for the time of hundreds of shapes.
"""

from __future__ import annotations

from shared.messages import BatchShape


class Tally:
    """A batch's shape so far."""

    __slots__ = ("context", "jobs", "new_context", "new_tokens", "rows")

    def __init__(
        self, jobs: int = 0, new_tokens: int = 0, new_context: int = 0, context: int = 0, rows: int = 0
    ) -> None:
        self.jobs = jobs
        self.new_tokens = new_tokens
        self.new_context = new_context
        self.context = context
        self.rows = rows

    def take(self, new: int, length: int, rows: int) -> None:
        """One more job: tokens to compute, the session's length after them, rows of logits."""
        self.jobs += 1
        self.new_tokens += new
        self.new_context += new * length
        self.context += length
        self.rows += rows

    def give_back(self, new: int, length: int, rows: int) -> None:
        """One job less."""
        self.jobs -= 1
        self.new_tokens -= new
        self.new_context -= new * length
        self.context -= length
        self.rows -= rows

    def shape(self) -> BatchShape:
        """The shape as it travels."""
        return BatchShape(
            jobs=self.jobs,
            new_tokens=self.new_tokens,
            new_context=self.new_context,
            context=self.context,
            rows=self.rows,
        )
