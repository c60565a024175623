"""The command line: one module for each group of commands, and what they share.

May import every other package, each where a command needs it: `--help`, completion and mistakes answer at once.
"""
