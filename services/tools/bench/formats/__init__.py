"""`wisp bench formats`: quality, memory and speed of the target in each format of weights."""
