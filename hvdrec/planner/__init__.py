"""Predict memory, bytes and time of a training step."""
