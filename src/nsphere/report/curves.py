"""The arithmetic of the comparison: what each arm needs to reach each loss, as a ratio to the best GPT arm.

Plain Python on plain lists, so that every number of the report can be checked by hand. Nothing is smoothed: a
validation curve is measured on a fixed set, and smoothing would move the very crossings that are read off
here.

**Non-monotone curves.** A loss counts as reached at the *first* point where the straight line between two
evaluations comes down to it, even if the curve rises again later. This is reading the running minimum of the
interpolated curve, and it is what a user gets who stops at the first checkpoint that is good enough. Both
arms are read by the same rule. Loss curves are convex, so a chord lies above the curve and the interpolation
says "slightly too late": at the best GPT arm's final loss, its own last evaluation, this can only hurt the
other arm.

**Seconds** are tokens divided by the arm's tokens per second from the interleaved timing, not a clock that
ran during training: noise on the machine while one arm was training would otherwise count against that arm.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

Arms = Mapping[str, Mapping[str, Any]]


def is_finite(value: float | None) -> TypeGuard[float]:
    """Whether a value was measured, and is a number."""
    return value is not None and math.isfinite(value)


def tokens_to_reach(curve_x: Sequence[float], curve_loss: Sequence[float | None], target: float) -> float | None:
    """The first x at which a curve, linear between its evaluations, is at or below `target`.

    Args:
        curve_x: where the loss was evaluated (tokens, steps or seconds), strictly increasing.
        curve_loss: the loss there, nats per token. None, NaN and infinities are taken as "not measured".
        target: the loss to reach.

    Returns:
        x, in the unit of `curve_x`; None where the curve never comes down to `target`.

    Raises:
        ValueError: if the lengths differ, if `curve_x` does not increase, or if `target` is not finite.
    """
    if not math.isfinite(target):
        raise ValueError(f"the loss to reach is {target}; give a finite number")
    xs, losses = _measured(curve_x, curve_loss)
    for i, loss in enumerate(losses):
        if loss <= target:
            if i == 0:
                return xs[0]
            fraction = (losses[i - 1] - target) / (losses[i - 1] - loss)
            return xs[i - 1] + fraction * (xs[i] - xs[i - 1])
    return None


def running_minimum(losses: Sequence[float]) -> list[float]:
    """The lowest loss so far, at each evaluation."""
    lowest: list[float] = []
    for loss in losses:
        lowest.append(min(loss, lowest[-1]) if lowest else loss)
    return lowest


def mean_curve(arm: Mapping[str, Any]) -> dict[str, Any]:
    """The validation curve of an arm: the mean over its seeds, and the seeds' range.

    Args:
        arm: an entry of the summary's `arms`; read is `arm["seeds"][seed]["curve"]["tokens" | "val_loss"]`.

    Returns:
        `tokens`, `val_loss` (mean), `low` and `high` (over the seeds), lists of one length, and `num_seeds`.
        Only the evaluations that every seed has, with a finite loss in each, are kept: a mean over changing
        seeds would jump.
    """
    curves = []
    for seed in arm.get("seeds", {}).values():
        if seed.get("curve"):
            curves.append(dict(zip(*_measured(seed["curve"]["tokens"], seed["curve"]["val_loss"]), strict=True)))
    tokens = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    columns = [[curve[t] for curve in curves] for t in tokens]
    return {
        "tokens": tokens,
        "val_loss": [math.fsum(column) / len(column) for column in columns],
        "low": [min(column) for column in columns],
        "high": [max(column) for column in columns],
        "num_seeds": len(curves),
    }


def best_gpt_arm(arms: Arms) -> str | None:
    """The GPT arm with the lowest finite final loss (mean over its seeds); None where there is none."""
    finals = {
        name: arm["final_val_loss"]
        for name, arm in arms.items()
        if arm.get("architecture") == "gpt" and is_finite(arm.get("final_val_loss"))
    }
    return min(finals, key=lambda name: finals[name]) if finals else None


def ngpt_arm(arms: Arms) -> str | None:
    """The arm that the question is about: `ngpt`, or else the variant of it with the lowest final loss."""
    variants = [name for name, arm in arms.items() if arm.get("architecture") == "ngpt"]
    if "ngpt" in arms or not variants:
        return "ngpt" if "ngpt" in arms else None
    return min(variants, key=lambda name: arms[name].get("final_val_loss") or math.inf)


def ratio_curve(arms: Arms, best: str | None) -> dict[str, Any]:
    """What every other arm needs to reach each loss, over what the best GPT arm needed.

    The losses are the whole range that the best GPT arm covers, from its first evaluation after the start
    down to its lowest. Before an arm's first evaluation only a straight line from the untrained model is known,
    and a ratio there would describe that line: it is left out, for the best GPT arm and for the others alike.
    Every evaluation of every arm in that range is a point, so between two neighbours all curves are straight.

    Args:
        arms: the summary's `arms`; read are the seeds' curves and `tokens_per_second`.
        best: the arm that the others are divided by, from `best_gpt_arm`.

    Returns:
        `loss` (descending); `tokens` and `seconds`, what the best GPT arm needed for it; and `arms`, for
        each other arm: `tokens_ratio` and `seconds_ratio` (a number per loss, None where it is never reached,
        reached before the arm's first evaluation or, for seconds, where the timing is missing) and
        `lowest_loss`, the lowest loss on its mean curve.
    """
    curve = {name: mean_curve(arm) for name, arm in arms.items()}
    empty: dict[str, Any] = {"best_gpt_arm": best, "loss": [], "tokens": [], "seconds": [], "arms": {}}
    if best is None or not curve[best]["tokens"]:
        return empty
    after_start = [loss for t, loss in zip(curve[best]["tokens"], curve[best]["val_loss"], strict=True) if t > 0]
    if not after_start:
        return empty
    lowest, highest = min(after_start), after_start[0]
    levels = set(running_minimum(after_start))
    for name in arms:
        levels.update(loss for loss in running_minimum(curve[name]["val_loss"]) if lowest <= loss <= highest)
    losses = sorted(levels, reverse=True)

    def needed(name: str) -> list[float | None]:
        first = next((t for t in curve[name]["tokens"] if t > 0), math.inf)
        reached = [_to_reach(curve[name], loss) for loss in losses]
        return [t if t is not None and t >= first else None for t in reached]

    tokens = {name: needed(name) for name in arms}
    seconds = {name: [_seconds(t, arms[name]) for t in tokens[name]] for name in arms}
    return {
        "best_gpt_arm": best,
        "loss": losses,
        "tokens": tokens[best],
        "seconds": seconds[best],
        "arms": {
            name: {
                "tokens_ratio": [_ratio(a, b) for a, b in zip(tokens[name], tokens[best], strict=True)],
                "seconds_ratio": [_ratio(a, b) for a, b in zip(seconds[name], seconds[best], strict=True)],
                "lowest_loss": min(curve[name]["val_loss"], default=None),
            }
            for name in arms
            if name != best
        },
    }


def headline_ratios(arms: Arms, best: str | None, candidate: str = "ngpt") -> dict[str, Any]:
    """What `candidate` needs to reach the best GPT arm's final loss, over what that arm needed.

    The final loss is the last evaluation of the arm's mean curve, so both sides read the same measurement.
    With several seeds the ratio is also given seed by seed: a seed's arms saw the same batches in the same
    order.

    Args:
        arms: the summary's `arms`.
        best: the best GPT arm's name, from `best_gpt_arm`.
        candidate: the arm that the question is about.

    Returns:
        `target_loss`; `tokens_ratio` and `seconds_ratio`, each None with a `..._reason` where there is no
        answer; `tokens_ratio_by_seed`, a ratio or None for each seed that both arms have;
        `reverse_tokens_ratio` and `reverse_seconds_ratio`: where the candidate never arrives, what the best
        GPT arm needed to reach the *candidate's* final loss, over what the candidate needed. Keys fit the
        summary: `summary.update(...)`.
    """
    answer: dict[str, Any] = {
        "target_loss": None,
        "tokens_ratio": None,
        "tokens_ratio_reason": None,
        "seconds_ratio": None,
        "seconds_ratio_reason": None,
        "tokens_ratio_by_seed": {},
        "reverse_tokens_ratio": None,
        "reverse_seconds_ratio": None,
    }
    reason = _no_answer(arms, best, candidate)
    if reason is not None or best is None:
        return answer | {"tokens_ratio_reason": reason, "seconds_ratio_reason": reason}

    ours, theirs = mean_curve(arms[candidate]), mean_curve(arms[best])
    target = answer["target_loss"] = theirs["val_loss"][-1]
    our_tokens, their_tokens = _to_reach(ours, target), _to_reach(theirs, target)
    our_seconds, their_seconds = _seconds(our_tokens, arms[candidate]), _seconds(their_tokens, arms[best])
    answer["tokens_ratio"] = _ratio(our_tokens, their_tokens)
    answer["seconds_ratio"] = _ratio(our_seconds, their_seconds)
    for seed in arms[candidate]["seeds"]:
        if seed in arms[best]["seeds"]:
            a, b = (mean_curve({"seeds": {seed: arms[name]["seeds"][seed]}}) for name in (candidate, best))
            if a["tokens"] and b["tokens"]:
                goal = b["val_loss"][-1]
                answer["tokens_ratio_by_seed"][seed] = _ratio(_to_reach(a, goal), _to_reach(b, goal))

    if our_tokens is None:
        reason = (
            f"{candidate} never reaches {best}'s final loss {target:.4f} in {ours['tokens'][-1]:,.0f} tokens "
            f"(its lowest is {min(ours['val_loss']):.4f})"
        )
        answer |= {"tokens_ratio_reason": reason, "seconds_ratio_reason": reason}
        goal = ours["val_loss"][-1]
        needed, had = _to_reach(theirs, goal), _to_reach(ours, goal)
        answer["reverse_tokens_ratio"] = _ratio(needed, had)
        answer["reverse_seconds_ratio"] = _ratio(_seconds(needed, arms[best]), _seconds(had, arms[candidate]))
    elif answer["tokens_ratio"] is None:
        reason = f"{best} has no evaluation better than its untrained model, so there is nothing to divide by"
        answer |= {"tokens_ratio_reason": reason, "seconds_ratio_reason": reason}
    elif answer["seconds_ratio"] is None:
        answer["seconds_ratio_reason"] = "the step times of both arms are needed, and were not measured"
    return answer


def _no_answer(arms: Arms, best: str | None, candidate: str) -> str | None:
    """Why no ratio can be formed at all; None where it can."""
    if candidate not in arms:
        return f"there is no arm {candidate!r} in this comparison"
    if best is None:
        return "no GPT arm with a finite final loss to compare with"
    for name in (candidate, best):
        if not mean_curve(arms[name])["tokens"]:
            return f"{name} has no validation curve with finite losses"
    return None


def _measured(xs: Sequence[float], losses: Sequence[float | None]) -> tuple[list[float], list[float]]:
    """The evaluations with a finite loss, after checking that the two lists are a curve."""
    if len(xs) != len(losses):
        raise ValueError(f"a curve needs one loss per x; received {len(xs)} x and {len(losses)} losses")
    for before, after in itertools.pairwise(xs):
        if not after > before:
            raise ValueError(f"a curve's x must increase; received {before} followed by {after}; sort or drop repeats")
    kept = [(x, loss) for x, loss in zip(xs, losses, strict=True) if is_finite(loss)]
    return [x for x, _ in kept], [loss for _, loss in kept]


def _to_reach(curve: Mapping[str, Any], target: float) -> float | None:
    return tokens_to_reach(curve["tokens"], curve["val_loss"], target)


def _seconds(tokens: float | None, arm: Mapping[str, Any]) -> float | None:
    rate = arm.get("tokens_per_second")
    return tokens / rate if tokens is not None and rate else None


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None
