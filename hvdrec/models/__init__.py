"""Towers, ranker and losses in plain torch."""
