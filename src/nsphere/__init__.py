"""nsphere: transformers on the unit hypersphere, in PyTorch.

Two parts: `QKNorm`, a normalisation of queries and keys for any attention, and `NGPT`, the normalized transformer.
"""

from nsphere import families
from nsphere.gpt import GPT, GPTConfig
from nsphere.hypersphere import SphereEmbedding, SphereLinear, assert_on_hypersphere, on_sphere
from nsphere.ngpt import NGPT, NGPTConfig
from nsphere.norms import L2Norm, LayerNorm, Norm, RMSNorm, make_norm, register_norm
from nsphere.optim import SphereAdamW, keep_on_hypersphere
from nsphere.presets import make_model
from nsphere.qk_clip import QKClip
from nsphere.qk_norm import QKNorm
from nsphere.rope import RopeSpec

__version__ = "0.1.0"

__all__ = [
    "GPT",
    "NGPT",
    "GPTConfig",
    "L2Norm",
    "LayerNorm",
    "NGPTConfig",
    "Norm",
    "QKClip",
    "QKNorm",
    "RMSNorm",
    "RopeSpec",
    "SphereAdamW",
    "SphereEmbedding",
    "SphereLinear",
    "assert_on_hypersphere",
    "families",
    "keep_on_hypersphere",
    "make_model",
    "make_norm",
    "on_sphere",
    "register_norm",
]
