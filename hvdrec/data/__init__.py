"""Read encoded shards as training batches: epoch plans, Parquet reading, collation, the loader."""
