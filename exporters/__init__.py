"""What a graph may become outside PyTorch."""
