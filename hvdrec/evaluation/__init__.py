"""Metrics, retrieval over the whole catalogue, and baselines to compare a model with."""
