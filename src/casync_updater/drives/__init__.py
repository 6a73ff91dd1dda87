"""Update drives: which file system appeared, whose backup is on it, and what is done with it."""
