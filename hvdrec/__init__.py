"""hvdrec trains, exports and serves recommenders: two towers and a DNN ranker on Horovod."""

__version__ = "0.1.0"
