"""Deployment: a bundle becomes an ONNX folder, and is compared with PyTorch."""
