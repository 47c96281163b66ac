"""Slow twins of the library's fast quantities: loops, autograd and dense float64 matrices.

Nothing here imports the library, so an error would have to be made twice to pass unseen.
"""
