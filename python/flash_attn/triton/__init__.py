"""Attention on every device with a Triton driver: the project's own kernels, and FlagGems'.

Importing this package does not import Triton; the first call that is served by it does.
"""
