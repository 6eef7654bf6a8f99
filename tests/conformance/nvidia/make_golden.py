"""Make golden.safetensors: what the authors' own code computes, to hold `convention="nvidia"` to.

    python make_golden.py path/to/ngpt/model.py

imports a checkout of https://github.com/NVIDIA/ngpt as it is, with FlashAttention replaced by PyTorch's attention, and
runs a small model forward and backward three times from the same weights: in its own mix of bf16 and fp32, and with
every bf16 in its text read as fp32 and as fp64. Nothing of that code is kept, only numbers:

    weights.<name>                    the authors' parameter names; block matrices in bf16, the rest fp32
    tokens, targets                   [B, T]
    table                             [T, D], the rotary table, which that code computes in fp32 whatever the rest is
    <dtype>.{logits, loss}            for bfloat16, float32, float64
    <dtype>.grad.<name>               for bfloat16 and float64
    initial.{logits, loss}            fp64, with every scale at its start

The matrices are unit rows or columns up to bf16's rounding. The scales are random, and a third of the α negative.
"""

import argparse
import hashlib
import importlib.util
import math
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

SHAPE = {"vocab_size": 97, "block_size": 24, "n_layer": 3, "n_head": 4, "n_embd": 32}
BATCH = 2
UNIT_COLUMNS = ("att_c_proj.weight", "mlp_c_proj.weight")


class LiftedTorch:
    """The torch module with bf16 and fp32 read as another dtype."""

    def __init__(self, dtype):
        self.bfloat16 = dtype
        self.float32 = dtype

    def __getattr__(self, name):
        return getattr(torch, name)


def attention(q, k, v, softmax_scale, causal, **_):
    """flash_attn_func's contract, [B, T, H, D], for the arguments that the authors' code gives."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale).transpose(1, 2)


def import_reference(path):
    flash_attn = types.ModuleType("flash_attn")
    flash_attn.flash_attn_func = attention
    flash_attn.flash_attn_qkvpacked_func = None
    sys.modules["flash_attn"] = flash_attn
    spec = importlib.util.spec_from_file_location("ngpt_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(reference, dtype, use_nGPT=1):
    """The authors' model; dtype None leaves its own mix."""
    reference.torch = torch if dtype is None else LiftedTorch(dtype)
    config = reference.GPTConfig(**SHAPE, base_scale=1 / math.sqrt(SHAPE["n_embd"]), use_nGPT=use_nGPT)
    model = reference.GPT(config)
    return model if dtype is None else model.to(dtype)


def make_weights(model):
    """Weights of the authors' own dtypes."""
    weights = {}
    for name, p in model.state_dict().items():
        if p.dim() == 2:
            w = F.normalize(torch.randn(p.shape), dim=0 if name.endswith(UNIT_COLUMNS) else 1)
        else:
            w = p * torch.empty(p.shape).uniform_(0.5, 1.5)
            if name.endswith("alpha"):
                w = 4 * w * torch.where(torch.rand(p.shape) < 1 / 3, -1.0, 1.0)
        weights[name] = w.to(p.dtype)
    # logits with a spread, so that the loss and its gradients are not those of a uniform guess
    weights["sz"] *= 10
    return weights


def run(model, weights, tokens, targets, autocast=False):
    model.load_state_dict(weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, loss = model(tokens, targets)
    loss.backward()
    return logits.detach(), loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model_py", type=Path, help="model.py of the authors' repository")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("golden.safetensors"))
    args = parser.parse_args()

    reference = import_reference(args.model_py)
    torch.manual_seed(0)
    tokens = torch.randint(SHAPE["vocab_size"], (BATCH, SHAPE["block_size"]))
    targets = torch.randint(SHAPE["vocab_size"], (BATCH, SHAPE["block_size"]))
    own = build(reference, None)
    initial = {name: p.clone() for name, p in own.state_dict().items()}
    weights = make_weights(own)

    golden = {f"weights.{name}": w for name, w in weights.items()} | {"tokens": tokens, "targets": targets}
    golden["table"] = reference.get_sinusoidal_embeddings(SHAPE["block_size"], SHAPE["n_embd"] // SHAPE["n_head"])
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        mixed = dtype is torch.bfloat16
        model = own if mixed else build(reference, dtype)
        name = str(dtype).removeprefix("torch.")
        golden[f"{name}.logits"], golden[f"{name}.loss"], grads = run(model, weights, tokens, targets, autocast=mixed)
        if dtype is not torch.float32:
            golden |= {f"{name}.grad.{p}": grad for p, grad in grads.items()}
    at_start = {name: w if w.dim() == 2 else initial[name] for name, w in weights.items()}
    golden["initial.logits"], golden["initial.loss"], _ = run(
        build(reference, torch.float64), at_start, tokens, targets
    )

    source = {
        "source": "https://github.com/NVIDIA/ngpt model.py",
        "sha256": hashlib.sha256(args.model_py.read_bytes()).hexdigest(),
        "torch": torch.__version__,
    }
    save_file({name: t.contiguous() for name, t in golden.items()}, args.out, metadata=source)
    print(f"{args.out}: {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
