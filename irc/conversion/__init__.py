"""Conversion: from a checkpoint to a bundle, phase by phase."""
