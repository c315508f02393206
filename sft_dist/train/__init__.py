"""Train: the worker. `python -m sft_dist.train RUN_DIR|CONFIG`."""
