"""Everything that talks to Horovod."""
