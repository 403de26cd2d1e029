"""Predict the memory, the network traffic and the time of a training step."""
