"""Alignment of networks from independent seeds: which units may be permuted, and which permutation to take.

`symmetries.permutation_groups` reads the groups of units off a network; `groups` permutes, balances and recombines them
in collections; `matching.align` permutes every network of a collection towards one reference.
"""
