"""nsphere in Hugging Face transformers."""

from nsphere.hf.fuse import FuseReport, fuse, unfuse
from nsphere.hf.max_logits import report_max_logits
from nsphere.hf.qk_norm import family_of, latent_norm, qk_norm, v_norm

__all__ = [
    "FuseReport",
    "family_of",
    "fuse",
    "latent_norm",
    "qk_norm",
    "report_max_logits",
    "unfuse",
    "v_norm",
]
