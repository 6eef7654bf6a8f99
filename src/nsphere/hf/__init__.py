"""nsphere in Hugging Face transformers."""

from nsphere.hf.max_logits import report_max_logits
from nsphere.hf.qk_norm import family_of, latent_norm, qk_norm, v_norm

__all__ = ["family_of", "latent_norm", "qk_norm", "report_max_logits", "v_norm"]
