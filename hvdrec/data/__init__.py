"""Encoded shards to training batches: epoch plans, Parquet reading, collation and the loader."""
