"""The report's table of the arms, each with its description and recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nsphere.report.curves import headline_ratios, mean_curve
from nsphere.report.drawing import arm_styles, count
from nsphere.report.html_parts import arm_title, escape, folded, table
from nsphere.report.verdict import seed_losses


def table_of_arms(summary: Mapping[str, Any]) -> str:
    """A column an arm: losses, what it took to reach the best GPT's, speed, size."""
    arms = summary["arms"]
    best = summary.get("best_gpt_arm")
    lowest = min(
        (arm["final_val_loss"] for arm in arms.values() if arm.get("final_val_loss") is not None), default=None
    )

    def to_reach(against: str) -> list[str]:
        cells = []
        for name in arms:
            answers = headline_ratios(arms, best, name)
            ratio, target = answers[f"{against}_ratio"], answers["target_loss"]
            falls_short = target is not None and min(mean_curve(arms[name])["val_loss"]) > target
            cells.append(f"{ratio:.2f}" if ratio is not None else "never" if falls_short else "–")
        return cells

    def each(key: str, form: Any) -> list[str]:
        return [form(arm[key]) if arm.get(key) is not None else "–" for arm in arms.values()]

    def with_seeds(arm: Mapping[str, Any]) -> str:
        losses = seed_losses(arm)
        loss = arm.get("final_val_loss")
        text = "–" if loss is None else f"{loss:.4f}"
        text = f"<strong>{text}</strong>" if loss is not None and loss == lowest else text
        if len(losses) > 1:
            return f"{text}<small>{min(losses):.3f}–{max(losses):.3f}</small>"
        spread = arm.get("final_val_loss_spread")
        return text + (f"<small>spread {spread:.3f}</small>" if spread is not None else "")

    def step_time(arm: Mapping[str, Any]) -> str:
        if arm.get("step_time_ms_median") is None:
            return "–"
        spread = arm.get("step_time_ms_spread")
        around = f"<small>{spread[0]:.3g}–{spread[1]:.3g}</small>" if spread else ""
        return f"{arm['step_time_ms_median']:.4g}{around}"

    lines = [("final validation loss, nats per token", [with_seeds(arm) for arm in arms.values()])]
    lines.append(("bits per byte", each("bits_per_byte", lambda v: f"{v:.4f}")))
    if best:
        goal = escape(arm_styles(arms)[best].title)
        lines.append((f"tokens to reach {goal}’s final loss, ratio", to_reach("tokens")))
        lines.append((f"seconds to reach {goal}’s final loss, ratio", to_reach("seconds")))
    lines += [
        ("learning rate", each("best_lr", lambda v: f"{v:.3g}")),
        ("tokens trained on", each("tokens", count)),
        ("steps", each("steps", lambda v: f"{v:,}")),
        ("step time, ms (median)", [step_time(arm) for arm in arms.values()]),
        ("tokens per second", each("tokens_per_second", lambda v: f"{v:,.0f}")),
        ("training, wall time with compiling", each("train_seconds", _duration)),
        ("peak memory", each("peak_memory_bytes", lambda v: f"{count(v)}B")),
        ("parameters", each("num_parameters", lambda v: f"{v:,}")),
    ]
    if any(arm.get("skipped_steps") for arm in arms.values()):
        lines.append(("steps skipped, loss not finite", each("skipped_steps", str)))
    return table(["", *(arm_title(name, arms) for name in arms)], lines, "arms")


def descriptions(summary: Mapping[str, Any]) -> str:
    """What each arm is, where its learning rate comes from, and the recipes."""
    styles = arm_styles(summary["arms"])
    items = []
    for name, arm in summary["arms"].items():
        source = f" Learning rate: {arm['lr_source']}." if arm.get("lr_source") else ""
        items.append(
            f"<dt>{escape(styles[name].title)} <code>{escape(name)}</code></dt>"
            f"<dd>{escape((arm.get('description') or 'no description').rstrip('.'))}.{escape(source)}</dd>"
        )
    return f'<dl class="arms">{"".join(items)}</dl>' + _recipes(summary["arms"])


def _recipes(arms: Mapping[str, Any]) -> str:
    """What each arm was optimised with, and the fields of its model that not all arms have."""
    recipe = {name: arm.get("recipe") or {} for name, arm in arms.items()}
    model = {name: arm.get("model") or {} for name, arm in arms.items()}
    # fields that every architecture has are the shape, which is the same for all and stands at the top of the page
    own = [field for fields in model.values() for field in fields if not all(field in m for m in model.values())]
    fields = list(dict.fromkeys([field for fields in recipe.values() for field in fields] + own))
    lines = [(escape(f), [_setting({**model[name], **recipe[name]}.get(f, "–")) for name in arms]) for f in fields]
    head = ["", *(escape(style.title) for style in arm_styles(arms).values())]
    return folded("The recipes", table(head, lines)) if lines else ""


def _setting(value: object) -> str:
    return escape(f"{value:.4g}" if isinstance(value, float) else value)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
