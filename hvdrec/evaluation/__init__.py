"""Metrics, full-catalogue evaluation, baselines and their report."""
