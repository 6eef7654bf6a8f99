"""nsphere: transformers on the unit hypersphere, in PyTorch."""

__version__ = "0.1.0"
