"""Transformer Engine's names and defaults on this library: `import nsphere.te as te`.

A script written for `transformer_engine.pytorch` runs where Transformer Engine does not, by changing that import.
Names, order and defaults of arguments, and state-dict keys, are those of Transformer Engine 2.20; see
docs/transformer-engine.md for what is there and what is not.
"""

from nsphere.te.attention import DotProductAttention
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
    "convert_state_dict",
    "install",
]
