"""What concerns Horovod: ranks, collectives, gradient sums, environment, watchdog, worker pools."""
