"""Text: where it comes from, its rows, its tokens."""
