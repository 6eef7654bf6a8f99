"""nsphere in Hugging Face transformers."""

from nsphere.hf.qk_norm import family_of, latent_norm, qk_norm, v_norm

__all__ = ["family_of", "latent_norm", "qk_norm", "v_norm"]
