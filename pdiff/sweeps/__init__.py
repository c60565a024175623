"""Sweeps: a study of Optuna whose trials are runs of experiments, run by workers on any number of hosts.

The only package that imports optuna; it imports tracking and what stands below it. Inside, from the bottom: schema,
storage, search, trials, launchers, command, objective (what workers do), workers, report, leader; beside them overhead.
"""
