"""Where Transformer Engine has them too: `from nsphere.te.attention import RotaryPositionEmbedding`."""

from nsphere.te.dot_product import DotProductAttention
from nsphere.te.multihead import MultiheadAttention
from nsphere.te.rope import RotaryPositionEmbedding

__all__ = ["DotProductAttention", "MultiheadAttention", "RotaryPositionEmbedding"]
