"""`wisp bench engine`: time of the engine's passes against transformers and llama.cpp."""
