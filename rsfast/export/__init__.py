"""One file for every resolution: a checkpoint exported to ONNX, and checked."""
