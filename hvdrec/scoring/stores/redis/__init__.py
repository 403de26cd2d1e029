"""Store embeddings in Redis, and publish a bundle's embeddings there; needs the extra ``redis``."""
