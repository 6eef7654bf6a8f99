"""QK-norm in a model of your own: two lines in its attention, and any norm by its name.

    python examples/qk_norm_in_your_model.py [--qk-norm rms|l2|layer|p3|none]

Trains a small byte-level transformer on the source of Python's standard library, with the norm and without it, at a
usual learning rate and at ten times that: the last lines say what each costs. Under a minute on two CPU cores.
"""

import argparse
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsphere import Norm, QKNorm, RopeSpec, register_norm

D_MODEL, NUM_HEADS, HEAD_DIM, CONTEXT = 128, 4, 32, 64


@register_norm("p3")
class P3Norm(Norm):
    """A norm that nobody published: the third root of the mean cube, with a weight."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        length = x.float().abs().pow(3).mean(-1, keepdim=True).add(1e-6).pow(1 / 3)
        return (x / length * self.weight).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention as everybody writes it, with QK-norm."""

    def __init__(self, qk_norm: str):
        super().__init__()
        self.qkv = nn.Linear(D_MODEL, 3 * D_MODEL, bias=False)
        self.out = nn.Linear(D_MODEL, D_MODEL, bias=False)
        self.rope = RopeSpec(dim=HEAD_DIM)
        # the first line: what the norm is
        self.qk_norm = QKNorm(None if qk_norm == "none" else qk_norm, head_dim=HEAD_DIM, rope=self.rope)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, NUM_HEADS, HEAD_DIM)).unbind(2)  # views; they are read where they lie
        # the second: norm and RoPE in one
        q, k = self.qk_norm(q, k, rope=self.rope.tables(x.shape[1]))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        # the norm says which scale belongs with it
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.qk_norm.softmax_scale)
        return self.out(y.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """x + attention, x + MLP."""

    def __init__(self, qk_norm: str):
        super().__init__()
        self.attn_norm, self.attn = nn.RMSNorm(D_MODEL), Attention(qk_norm)
        self.mlp_norm = nn.RMSNorm(D_MODEL)
        self.mlp = nn.Sequential(nn.Linear(D_MODEL, 4 * D_MODEL), nn.GELU(), nn.Linear(4 * D_MODEL, D_MODEL))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


def train(qk_norm: str, lr: float, data: Tensor, steps: int) -> float:
    """Train a model from the same start on the same batches, whatever the norm; the mean loss of the last 25 steps."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(256, D_MODEL), Block(qk_norm), Block(qk_norm), nn.RMSNorm(D_MODEL), nn.Linear(D_MODEL, 256)
    )
    nn.init.normal_(model[0].weight, std=0.02)  # torch's 1 would drown what the blocks add
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    random, losses = torch.Generator().manual_seed(0), []
    for step in range(1, steps + 1):
        starts = torch.randint(0, len(data) - CONTEXT - 1, (16,), generator=random)
        batch = torch.stack([data[i : i + CONTEXT + 1] for i in starts])
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses = [*losses[-24:], loss.item()]
        if step % 50 == 0 or step == steps:
            print(f"{qk_norm}, lr {lr:g}: step {step}, loss {sum(losses) / len(losses):.2f} nats per byte", flush=True)
    return sum(losses) / len(losses)


def main() -> None:
    """Train all four, and print their losses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--qk-norm", default="rms", help="rms, l2, layer, p3 (defined in this file) or none")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-3, 3e-2])
    args = parser.parse_args()

    text = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("[a-e]*.py")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    norms = list(dict.fromkeys((args.qk_norm, "none")))
    for lr in args.lr:
        losses = [train(qk_norm, lr, data, args.steps) for qk_norm in norms]
        said = ", ".join(f"{loss:.2f} with {name}" for loss, name in zip(losses, norms, strict=True))
        print(f"at a learning rate of {lr:g}: {said}", flush=True)


if __name__ == "__main__":
    main()
