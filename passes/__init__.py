"""Rewrites of captured graphs; depends on torch alone."""
