"""The stages: what they fit, their losses, the one loop, and what makes them fit on small and on many machines."""
