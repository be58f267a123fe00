"""Residual quantizers: each level quantizes what the levels before it have left.

The layers of the package again, for a chain of codebooks: module, autograd, ops, backends.
"""
