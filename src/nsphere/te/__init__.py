"""Transformer Engine's names and defaults on this library: `import nsphere.te as te`.

A script written for `transformer_engine.pytorch` runs where Transformer Engine does not, by changing that import.
Names, order and defaults of arguments, and state-dict keys, are those of Transformer Engine 2.20; see
docs/transformer-engine.md for what is there and what is not.
"""

from nsphere.te import attention as attention
from nsphere.te.dot_product import DotProductAttention
from nsphere.te.fp8 import autocast, fp8_autocast, fp8_model_init, is_fp8_available, quantized_model_init
from nsphere.te.install import install
from nsphere.te.linear import LayerNormLinear, LayerNormMLP, Linear
from nsphere.te.multihead import MultiheadAttention
from nsphere.te.norms import L2Normalization, LayerNorm, RMSNorm
from nsphere.te.rope import RotaryPositionEmbedding
from nsphere.te.state_dict import convert_state_dict
from nsphere.te.transformer import TransformerLayer

__all__ = [
    "DotProductAttention",
    "L2Normalization",
    "LayerNorm",
    "LayerNormLinear",
    "LayerNormMLP",
    "Linear",
    "MultiheadAttention",
    "RMSNorm",
    "RotaryPositionEmbedding",
    "TransformerLayer",
    "autocast",
    "convert_state_dict",
    "fp8_autocast",
    "fp8_model_init",
    "install",
    "is_fp8_available",
    "quantized_model_init",
]
