"""nGPT in a training loop of your own: the model, any optimizer, and one line that keeps it on the sphere.

    python examples/train_ngpt.py

Learns bytes of Python's standard library for 120 steps and writes a little code. Under a minute on two CPU cores.
"""

import argparse
import os
from pathlib import Path

import torch

from nsphere import NGPT, NGPTConfig, assert_on_hypersphere, keep_on_hypersphere
from nsphere.generate import Sampling, generate


def main() -> None:
    """Train, check the sphere, sample."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    args = parser.parse_args()

    torch.manual_seed(0)
    text = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("[a-e]*.py")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()

    config = NGPTConfig(
        vocab_size=256,
        context=128,
        d_model=128,
        num_layers=2,
        num_heads=4,
        # about 1/num_layers, and s_z near 10: the paper's 0.05 and 1 cost a short run its first hundreds of steps
        eigen_lr_init=0.5,
        s_z_init=10.0,
    )
    model = NGPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0)
    keep_on_hypersphere(model, optimizer)  # after every optimizer.step()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)

    losses: list[float] = []
    for step in range(1, args.steps + 1):
        starts = torch.randint(0, len(data) - config.context - 1, (16,))
        batch = torch.stack([data[i : i + config.context + 1] for i in starts])
        loss = model.loss(batch[:, :-1], batch[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses = [*losses[-24:], loss.item()]
        if step % 25 == 0 or step == args.steps:
            print(f"step {step}, loss {sum(losses) / len(losses):.2f} nats per byte (mean of the last 25)", flush=True)

    assert_on_hypersphere(model)  # every row that should have length 1 has it, to 1e-6
    alpha = torch.stack([block.eigen_lr_attn().abs().mean() for block in model.blocks])
    print(f"eigen learning rates of attention, from {config.eigen_lr_init}: {', '.join(f'{a:.2f}' for a in alpha)}")
    tokens = generate(model, list(b"def "), 100, Sampling(temperature=0.5))
    print("def " + bytes(tokens).decode(errors="replace"))


if __name__ == "__main__":
    main()
