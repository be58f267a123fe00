"""Tiles of the kernels: tables of them, what predicts and measures them, and the command."""
