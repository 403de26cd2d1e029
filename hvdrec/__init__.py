"""hvdrec trains, exports and serves recommenders: two towers and a DNN ranker on Horovod."""

import os

__version__ = "0.1.0"

# From 1.31 on, onnxruntime keeps a device's number in the user's home and reports its use, unless
# this is set before its import. Who wants that sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
