"""Checks of native operators against the eager dialect."""
