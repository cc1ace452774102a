"""Pure: schedules of faults, requests drawn from a seed, and the judgement of a run."""
