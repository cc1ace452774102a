"""Pure: answers, rounds and the state of a suite, as data and as terminal text."""
