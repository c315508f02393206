"""Jobs: start the worker, here through torchrun."""
