"""Shards to batches: which rank reads which rows when."""
