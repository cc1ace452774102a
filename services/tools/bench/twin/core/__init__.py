"""Pure: the comparison of two measurements of the same load."""
