"""Embeddings in Redis: the store and its publisher."""
