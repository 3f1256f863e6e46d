"""Downstream tasks by lm-evaluation-harness: our models as its language models, and a few tasks of our own."""
