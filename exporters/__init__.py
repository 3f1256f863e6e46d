"""Formats that a graph can be exported to."""
