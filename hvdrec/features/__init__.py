"""Features: fitted once, compiled into one ONNX graph, encoded into shards by running it."""
