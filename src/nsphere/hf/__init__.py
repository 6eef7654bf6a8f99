"""nsphere in Hugging Face transformers."""

from nsphere.hf.add_qk_norm import add_qk_norm, load, remove_qk_norm
from nsphere.hf.fuse import FuseReport, fuse, unfuse
from nsphere.hf.max_logits import report_max_logits
from nsphere.hf.qk_norm import family_of, latent_norm, qk_norm, v_norm

__all__ = [
    "FuseReport",
    "add_qk_norm",
    "family_of",
    "fuse",
    "latent_norm",
    "load",
    "qk_norm",
    "remove_qk_norm",
    "report_max_logits",
    "unfuse",
    "v_norm",
]
