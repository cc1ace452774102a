"""Pure: speeds, ratios and tables from the times of requests."""
