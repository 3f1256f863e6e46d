"""Training: the stages, their losses, the training loop, and support for small machines and for several processes."""
