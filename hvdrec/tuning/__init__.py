"""A search over fields of a run's configuration, by the validation metric."""
