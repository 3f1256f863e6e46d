"""Evaluation: a model's figures on text and on tasks."""
