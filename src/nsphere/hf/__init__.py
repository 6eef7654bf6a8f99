"""nsphere in Hugging Face transformers. Importing it makes nGPT known to transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from nsphere.hf.add_qk_norm import add_qk_norm, load, remove_qk_norm
from nsphere.hf.convert import from_hf, to_hf
from nsphere.hf.fuse import FuseReport, fuse, unfuse
from nsphere.hf.max_logits import report_max_logits
from nsphere.hf.modeling_ngpt import NGPTConfig, NGPTForCausalLM, NGPTModel
from nsphere.hf.qk_norm import family_of, latent_norm, qk_norm, v_norm
from nsphere.hf.trainer import SphereCallback

AutoConfig.register("ngpt", NGPTConfig)
AutoModel.register(NGPTConfig, NGPTModel)
AutoModelForCausalLM.register(NGPTConfig, NGPTForCausalLM)

__all__ = [
    "FuseReport",
    "NGPTConfig",
    "NGPTForCausalLM",
    "NGPTModel",
    "SphereCallback",
    "add_qk_norm",
    "family_of",
    "from_hf",
    "fuse",
    "latent_norm",
    "load",
    "qk_norm",
    "remove_qk_norm",
    "report_max_logits",
    "to_hf",
    "unfuse",
    "v_norm",
]
