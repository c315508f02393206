"""Evaluate: ask and score a model, before and after training."""
