"""Check: is this machine fit for training."""
