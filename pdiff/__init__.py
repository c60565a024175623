"""pdiff: a laboratory for generating neural-network weights."""

__version__ = "0.1.0"
