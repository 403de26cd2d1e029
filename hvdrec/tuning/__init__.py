"""Search over a configuration's fields for the best validation metric, on top of Optuna."""
