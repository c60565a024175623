"""The algorithm, with nothing of the platform: collection, standardise, compress, diffuse, sample.

Tensors in, tensors out; mistakes are ValueErrors. May import the ground floor (errors, seeds, parallel, files) alone.
The options of every choice stand in modules that import no torch, so that a configuration can be checked without it.
"""
