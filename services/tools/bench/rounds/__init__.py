"""`wisp bench rounds`: the time of a round outside the model, and the messages, Redis calls and CPU time of a token."""
