"""`wisp bench twin`: the real suite on a twin, and the simulator, under the same load."""
