"""A sweep of learning rates on a grid that grows until the best lies inside it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LR_STEPS_PER_DECADE = 5
"""The grid: 1, 1.6, 2.5, 4, 6.3 times a power of ten."""
MAX_SWEEP_RUNS = 12


@dataclass(frozen=True)
class Sweep:
    """Final validation losses on a grid of learning rates; a run that diverged counts as inf."""

    losses: dict[float, float]

    @property
    def best(self) -> float:
        """The rate with the lowest loss."""
        return min(self.losses, key=lambda lr: self.losses[lr])

    @property
    def best_inside(self) -> bool:
        """Whether the grid goes on, with higher losses, on both sides of the best."""
        return min(self.losses) < self.best < max(self.losses)

    def as_record(self) -> dict[str, Any]:
        """For the summary; a diverged run's loss is null."""
        rates = sorted(self.losses)
        losses = [self.losses[lr] if math.isfinite(self.losses[lr]) else None for lr in rates]
        return {"lr": rates, "val_loss": losses, "best_inside_grid": self.best_inside}


def grid_lr(i: int) -> float:
    """Learning rate number i of the grid, to two digits; number -15 is 0.001."""
    return float(f"{10 ** (i / LR_STEPS_PER_DECADE):.1e}")


def sweep_lr(start: float, loss_at: Callable[[float], float]) -> Sweep:
    """Try the grid's rates around `start`, and go on at whichever edge is best until none is.

    Args:
        start: a learning rate that is thought good.
        loss_at: trains with a learning rate, and returns the final loss; inf where that diverged.
    """
    middle = round(math.log10(start) * LR_STEPS_PER_DECADE)
    losses: dict[int, float] = {}
    wanted = [middle - 1, middle, middle + 1]
    while wanted and len(losses) < MAX_SWEEP_RUNS:
        for i in wanted:
            losses[i] = loss_at(grid_lr(i))
        best = min(losses, key=lambda i: losses[i])
        wanted = [i for i in (best - 1, best + 1) if i not in losses]
    return Sweep({grid_lr(i): loss for i, loss in losses.items()})
