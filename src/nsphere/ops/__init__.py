"""The fused operations: each has a plain PyTorch reference, which is the truth."""
