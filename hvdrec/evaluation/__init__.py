"""Metrics, full-catalogue retrieval, and the baselines that a model has to beat."""
