"""Evaluates models on text and on tasks."""
