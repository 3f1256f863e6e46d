"""What may be done to a graph; needs torch alone."""
