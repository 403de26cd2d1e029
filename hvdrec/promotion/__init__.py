"""Promotion: compare a new model with the one that serves, then publish it or say why not."""
