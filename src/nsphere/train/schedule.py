"""Learning-rate schedules: the factor on the peak rate, as a function of the step."""

import math

from nsphere.train.arms import ScheduleName


def lr_factor(schedule: ScheduleName, step: int, num_steps: int, warmup_steps: int, decay_fraction: float) -> float:
    """The factor on the peak learning rate at `step` (from 0) of `num_steps`.

    Linear warmup over `warmup_steps`, then: cosine or linear from 1 towards 0 at the end, or wsd
    (warmup-stable-decay): 1 until the last `decay_fraction` of the steps, linear to 0 there.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "linear":
        return 1 - progress
    assert schedule == "wsd", schedule
    return min(1.0, (num_steps - step) / max(1, round(decay_fraction * num_steps)))
