"""The hypersphere in a model that was made without it: a small vision transformer, its matrices kept at length 1.

    python examples/vit_on_the_hypersphere.py [--free]

The task: which way do noisy stripes run (8 directions). --free trains the same model without the sphere. Under half a
minute on two CPU cores.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsphere import assert_on_hypersphere, keep_on_hypersphere, on_sphere

SIZE, PATCH, D_MODEL, DIRECTIONS = 24, 4, 64, 8


def stripes(count: int) -> tuple[Tensor, Tensor]:
    """Images [count, 1, SIZE, SIZE] of stripes in noise, and the direction of each."""
    labels = torch.randint(DIRECTIONS, (count,))
    angle = (labels * math.pi / DIRECTIONS)[:, None, None]
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    phase = torch.rand(count, 1, 1) * 2 * math.pi
    waves = torch.sin((x * angle.cos() + y * angle.sin()) * 0.8 + phase)
    return (waves + torch.randn(count, SIZE, SIZE)).unsqueeze(1), labels


class ViT(nn.Module):
    """Patches, a learned position each, two of torch's own encoder layers, the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, D_MODEL, PATCH, PATCH)
        self.positions = nn.Parameter(torch.randn((SIZE // PATCH) ** 2, D_MODEL) * 0.02)
        layer = nn.TransformerEncoderLayer(D_MODEL, 4, 128, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(D_MODEL, DIRECTIONS)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.encoder(x).mean(1))


def put_on_sphere(model: ViT) -> None:
    """Say of each matrix along which dim it faces the hidden state: rows where it reads it, columns where it writes."""
    for layer in model.encoder.layers:
        on_sphere(layer.self_attn, dim=1, parameter="in_proj_weight")
        on_sphere(layer.self_attn.out_proj, dim=0)
        on_sphere(layer.linear1, dim=1)
        on_sphere(layer.linear2, dim=0)


def main() -> None:
    """Train, check the sphere, and measure on fresh images."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--free", action="store_true", help="the same model without the sphere")
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()

    torch.manual_seed(0)
    model = ViT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0)
    if not args.free:
        put_on_sphere(model)
        keep_on_hypersphere(model, optimizer)
    for step in range(1, args.steps + 1):
        images, labels = stripes(64)
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}, loss {loss.item():.3f}", flush=True)
    if not args.free:
        assert_on_hypersphere(model)
    with torch.no_grad():
        images, labels = stripes(1000)
        share = (model(images).argmax(-1) == labels).float().mean().item()
    print(f"{'free' if args.free else 'on the sphere'}: {share:.1%} of fresh images right; chance is 12.5%")


if __name__ == "__main__":
    main()
