"""Shape of a batch under construction.

It has the five numbers of `BatchShape` but is changed in place, because one decision predicts the time of hundreds of
shapes.
"""

from __future__ import annotations


class MutableShape:
    """Sums over the jobs added so far."""

    __slots__ = ("context", "jobs", "new_context", "new_tokens", "rows")

    def __init__(
        self, jobs: int = 0, new_tokens: int = 0, new_context: int = 0, context: int = 0, rows: int = 0
    ) -> None:
        self.jobs = jobs
        self.new_tokens = new_tokens
        self.new_context = new_context
        self.context = context
        self.rows = rows

    def copy(self) -> MutableShape:
        """Return a shape of its own with the same sums."""
        return MutableShape(self.jobs, self.new_tokens, self.new_context, self.context, self.rows)

    def add(self, new: int, length: int, rows: int) -> None:
        """Add a job: tokens to compute, the session's length after them, rows of logits."""
        self.jobs += 1
        self.new_tokens += new
        self.new_context += new * length
        self.context += length
        self.rows += rows

    def remove(self, new: int, length: int, rows: int) -> None:
        """Remove a job that was added with the same arguments."""
        self.jobs -= 1
        self.new_tokens -= new
        self.new_context -= new * length
        self.context -= length
        self.rows -= rows
