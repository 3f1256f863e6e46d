"""Exported folders on ONNX Runtime: checked, run, continued, held against PyTorch; where our operators' kernels are."""
