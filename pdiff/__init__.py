"""pdiff: a laboratory for generating neural-network weights."""
