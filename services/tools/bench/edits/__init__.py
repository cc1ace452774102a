"""Predicted outputs: rounds and speed of edits whose client sends the text before the edit as its prediction."""
