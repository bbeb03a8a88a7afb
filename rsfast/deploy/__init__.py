"""Running an exported network, without PyTorch."""
