"""Tools that people run by hand: the command line, the local stack, benchmarks, chaos, replay, training."""
