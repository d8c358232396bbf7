"""A synthetic world of coloured, patterned shapes on varied backgrounds, with captions, masks and benchmark triplets.

Everything is a pure function of (split, index). Imports numpy and Pillow only.
"""
