"""Parts that several benchmarks and the chaos tool share: results, options, tiny models, delaying relays."""
