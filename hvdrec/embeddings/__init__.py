"""Embedding tables outside the model: lookup, placement, sharded exchange, kernels, files."""
