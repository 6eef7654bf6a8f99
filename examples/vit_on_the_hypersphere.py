"""The hypersphere in a model that was made without it: a small vision transformer, its matrices kept at length 1.

    python examples/vit_on_the_hypersphere.py

The task: which way do noisy stripes run (8 directions). The same model is trained twice, as torch made it and on the
sphere, from the same seed, on the same images, at the same learning rate; the last lines say which did better, and
whether that is more than chance. Under a minute on two CPU cores.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsphere import assert_on_hypersphere, keep_on_hypersphere, on_sphere

SIZE, PATCH, D_MODEL, DIRECTIONS = 24, 4, 64, 8


def stripes(count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images [count, 1, SIZE, SIZE] of stripes in noise, and the direction of each."""
    labels = torch.randint(DIRECTIONS, (count,), generator=random)
    angle = (labels * math.pi / DIRECTIONS)[:, None, None]
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    phase = torch.rand(count, 1, 1, generator=random) * 2 * math.pi
    waves = torch.sin((x * angle.cos() + y * angle.sin()) * 0.8 + phase)
    return (waves + torch.randn(count, SIZE, SIZE, generator=random)).unsqueeze(1), labels


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


def train(name: str, sphere: bool, steps: int, lr: float) -> ViT:
    """Train one of the two, from the same start on the same images."""
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(0)
    model = ViT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0)
    if sphere:
        put_on_sphere(model)
        keep_on_hypersphere(model, optimizer)  # after every optimizer.step()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses: list[float] = []
    for step in range(1, steps + 1):
        images, labels = stripes(64, random)
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses = [*losses[-24:], loss.item()]
        if step % 50 == 0 or step == steps:
            print(f"{name}: step {step}, loss {sum(losses) / len(losses):.3f} (mean of the last 25)", flush=True)
    return model


def main() -> None:
    """Train both, check the sphere, and measure both on the same fresh images."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()

    plain = train("as torch made it", False, args.steps, args.lr)
    sphere = train("on the sphere", True, args.steps, args.lr)
    assert_on_hypersphere(sphere)  # every row that should have length 1 has it, to 1e-6

    images, labels = stripes(4000, torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain_right, sphere_right = (model(images).argmax(-1) == labels for model in (plain, sphere))
    print(
        f"of {len(labels)} fresh images right: {plain_right.float().mean():.1%} as torch made it, "
        f"{sphere_right.float().mean():.1%} on the sphere; chance is {1 / DIRECTIONS:.1%}"
    )
    # Only images that one of the two gets wrong tell them apart. If the two were equally good, a coin would be thrown
    # for each, and gained - lost would be about the root of their number.
    gained, lost = int((sphere_right & ~plain_right).sum()), int((plain_right & ~sphere_right).sum())
    verdict = "helped" if gained > lost else "harmed"
    if abs(gained - lost) <= 2 * math.sqrt(gained + lost):
        verdict = "made no difference that these images can show"
    print(f"the sphere gained {gained} of them and lost {lost}: it {verdict} (one seed, learning rate {args.lr:g})")


if __name__ == "__main__":
    main()
