"""Embedding stores of the scorer."""
