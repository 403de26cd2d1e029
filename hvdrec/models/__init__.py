"""The model in plain PyTorch: user tower, item tower, ranker, and their losses."""
