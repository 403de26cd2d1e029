"""Checks of samples before training: ``hvdrec check``."""
