"""Make golden.safetensors: what PyPI's nGPT-pytorch computes, to hold its import to.

    pip install torch nGPT-pytorch==0.2.16 safetensors; python make_golden.py

One small model for each way in which its options agree with nsphere, with scales at random. Nothing of its code is
kept, only numbers: <case>.weights.<name> as its state dict has them, <case>.logits in fp32, and tokens.
"""

import importlib
from pathlib import Path

import torch
from nGPT_pytorch import nGPT
from safetensors.torch import save_file

SHAPE = {"num_tokens": 29, "dim": 24, "depth": 2, "dim_head": 8, "heads": 2, "add_value_residual": False}
CASES = {
    "default": {},
    "manual": {"manual_norm_weights": True},
    "tied": {"tied_embedding": True},
    "plain_qk": {"attn_norm_qk": False},
    "scales": {
        "alpha_attn_init": (0.3, 0.2),
        "alpha_ff_scale": 0.5,
        "s_qk_init": 1.5,
        "s_qk_scale": 0.5,
        "s_logit_init": 4.0,
        "s_ff_gate_init": 1.2,
        "s_ff_hidden_scale": 2.0,
    },
}


def main():
    package = importlib.import_module("nGPT_pytorch.nGPT")  # not the class of the same name
    for kind in vars(package).values():  # 0.2.16 defines __eq__ without __hash__, and then can't be called
        if isinstance(kind, type) and issubclass(kind, torch.nn.Module) and kind.__hash__ is None:
            kind.__hash__ = torch.nn.Module.__hash__
    torch.manual_seed(0)
    golden = {"tokens": torch.randint(SHAPE["num_tokens"], (2, 12))}
    for case, options in CASES.items():
        model = nGPT(**SHAPE, **options)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("scale.scale"):
                    p.mul_(torch.empty_like(p).uniform_(0.5, 1.5) * (8 if name.startswith("logit") else 1))
                if name.endswith("original"):  # which its parametrisation takes back
                    p.mul_(torch.empty_like(p).uniform_(0.5, 1.5))
            golden[f"{case}.logits"] = model(golden["tokens"])
        golden |= {f"{case}.weights.{name}": t.clone() for name, t in model.state_dict().items()}
    out = Path(__file__).with_name("golden.safetensors")
    save_file({name: t.contiguous() for name, t in golden.items()}, out, {"source": "nGPT-pytorch 0.2.16"})
    print(f"{out}: {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
