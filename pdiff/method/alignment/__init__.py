"""Alignment of networks from independent seeds: which units may be permuted, and which permutation to take.

`symmetries.permutation_groups` reads the groups of units off a network (`labelling` runs its graph, `units` keeps what
follows); `groups` permutes, balances and recombines units of collections; `matching.align` permutes every network of a
collection towards one reference.
"""
