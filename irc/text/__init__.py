"""Loading text, splitting it, and turning it into windows of tokens."""
