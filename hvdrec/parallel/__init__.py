"""Ranks and Horovod: collectives, gradient sums, environment, checks, watchdog, worker pools."""
