"""Pure: what the commands show, as data and as terminal text."""

__all__ = ["answer_rounds"]
