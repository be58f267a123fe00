"""Fills the tables of `vqtriton.tiles`: what predicts and measures tiles, and the command."""
