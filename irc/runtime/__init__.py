"""Exported folders on ONNX Runtime: checked, run, continued; no module here imports torch, transformers or onnx."""
