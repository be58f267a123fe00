"""Tiles of the kernels, as a running program asks for them: tables, and a trace of its shapes."""
