"""The result of a comparison in words: who needed how much, and what to know before believing it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nsphere.report.curves import headline_ratios, mean_curve, ngpt_arm
from nsphere.report.drawing import arm_styles, count


def answer(summary: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The comparison's result in one sentence, whichever way it went, and the remarks that belong with it."""
    arms = summary["arms"]
    styles = arm_styles(arms)
    best, name = summary.get("best_gpt_arm"), ngpt_arm(arms)
    if name is None or best is None:
        only, missing = best or name, "GPT" if best is None else "nGPT"
        result = f"; {styles[only].title} ended at {_loss_text(arms[only])}" if only else ""
        return f"No {missing} arm was measured, so there is no comparison{result}.", []

    found = summary if name == "ngpt" else headline_ratios(arms, best, name)
    ratio, seconds = found.get("tokens_ratio"), found.get("seconds_ratio")
    ours, theirs, ended = styles[name].title, styles[best].title, _loss_text(arms[name], "")
    target = mean_curve(arms[best])["val_loss"][-1:]
    goal = f"{target[0]:.3f} nats per token" if target else _loss_text(arms[best])
    after = f" after {count(arms[name]['tokens'])} tokens" if arms[name].get("tokens") else ""
    remarks = [f"{theirs} is the best GPT arm here; its final loss is {goal}. {ours} itself ended at {ended}{after}."]
    if ratio is not None and seconds is not None:
        link = "and" if (ratio < 1) == (seconds < 1) else "but"
        cost = f"{ratio:.2f}× the tokens {link} {seconds:.2f}× the seconds"
        sentence = f"{ours} needed {cost} to reach {theirs}’s final loss."
    elif ratio is not None:
        sentence = f"{ours} needed {ratio:.2f}× the tokens to reach {theirs}’s final loss."
        remarks.append(f"In seconds: {found.get('seconds_ratio_reason') or 'not measured'}.")
    elif found.get("reverse_tokens_ratio") is not None:
        sentence = f"{ours} did not reach {theirs}’s final loss of {goal}; it ended at {ended}."
        reverse = f"{theirs} reached {ours}’s final loss with {found['reverse_tokens_ratio']:.2f}× the tokens"
        if found.get("reverse_seconds_ratio") is not None:
            reverse += f" and {found['reverse_seconds_ratio']:.2f}× the seconds"
        remarks = [f"{reverse} that {ours} needed."]
    else:
        sentence = f"This run gives no ratio between {ours} and {theirs}."
        remarks = [f"{found.get('tokens_ratio_reason') or 'No reason was recorded'}."]
    return sentence, [*remarks, _caution(arms, best, name, found.get("tokens_ratio_by_seed") or {})]


def _caution(arms: Mapping[str, Any], best: str, name: str, by_seed: Mapping[str, float | None]) -> str:
    """What a reader must know before believing the sentence above it."""
    styles = arm_styles(arms)
    said = []
    if len(by_seed) > 1:
        reached = [ratio for ratio in by_seed.values() if ratio is not None]
        if reached:
            said.append(f"Seed by seed the tokens ratio lies between {min(reached):.2f} and {max(reached):.2f}")
        if len(reached) < len(by_seed):
            said.append(
                f"In {len(by_seed) - len(reached)} of {len(by_seed)} seeds {styles[name].title} did not get there"
            )
        ours, theirs = (seed_losses(arms[arm]) for arm in (name, best))
        if ours and theirs and max(min(ours), min(theirs)) <= min(max(ours), max(theirs)):
            said.append("The seeds’ final losses overlap: it takes more seeds to tell the two apart")
    else:
        said.append("One seed: how much of the difference is chance cannot be told from this run")
    edge = [n for n, arm in arms.items() if (arm.get("lr_sweep") or {}).get("best_inside_grid") is False]
    if edge:
        names = " and ".join(styles[name].title for name in edge)
        said.append(f"The best learning rate of {names} lies at the edge of the grid: it may do better than shown")
    untuned = [n for n in (best, name) if "not tuned" in (src := arms[n].get("lr_source") or "") or "not for" in src]
    if untuned:
        names = " and ".join(styles[n].title for n in untuned)
        said.append(f"The learning rate of {names} was not tuned for these settings: --sweep-lr tunes every arm")
    return ". ".join(said) + "."


def seed_losses(arm: Mapping[str, Any]) -> list[float]:
    """The final losses of an arm's seeds, as far as they are finite."""
    losses = [seed.get("final_val_loss") for seed in (arm.get("seeds") or {}).values()]
    return [loss for loss in losses if loss is not None]


def _loss_text(arm: Mapping[str, Any], unit: str = " nats per token") -> str:
    loss = arm.get("final_val_loss")
    return "no finite loss" if loss is None else f"{loss:.3f}{unit}"
