"""Parts that benchmarks and the chaos tool share: results, options, random words, tiny models, delaying relays."""

__all__ = ["options", "relay", "report", "tiny", "words"]
