"""Search, with Optuna, for the values of configuration fields with the best validation metric."""
