"""Symbolic expressions as integer arrays, one compiled interpreter, and their evolution."""
