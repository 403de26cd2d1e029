"""Horovod: ranks, collectives, gradient sums, watchdog, environment, and worker pools."""
