"""Parts that benchmarks and the chaos tool share: results, options, drafts, random words, tiny models, relays."""

__all__ = ["options", "pair", "relay", "report", "tiny", "words"]
