"""Pure: the operations that the engine benchmark times, and tables, ratios and sentences from their times."""
