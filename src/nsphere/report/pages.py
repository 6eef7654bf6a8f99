"""The page that a comparison leaves: one self-contained HTML file that answers the question first, then shows why.

The page loads nothing and runs nothing (`html_parts.py`); its pictures are inline SVG (`pictures.py`). A piece that was
not measured is said to be missing, in words, at its place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nsphere.report import pictures
from nsphere.report.arms_table import descriptions, table_of_arms
from nsphere.report.curves import mean_curve
from nsphere.report.drawing import arm_styles, count
from nsphere.report.html_parts import (
    arm_title,
    block,
    escape,
    figure,
    folded,
    html_page,
    not_available,
    pair,
    section,
    table,
)
from nsphere.report.inside_figures import inside_figures
from nsphere.report.verdict import answer, seed_losses
from nsphere.train.files import atomic_write_text


def write_report(summary: Mapping[str, Any], path: Path) -> None:
    """Write the report of a comparison; the file is complete or it is not there.

    Args:
        summary: what `nsphere compare` measured, as in its summary.json.
        path: the HTML file to write, in a folder that exists.

    Raises:
        OSError: if the file cannot be written.
    """
    summary = _measured(summary)
    sentence, remarks = answer(summary)
    environment = summary.get("environment") or {}
    body = [
        "<header>",
        f'<p class="kicker">{escape(" · ".join(_what_was_run(summary)))}</p>',
        f"<h1>{escape(sentence)}</h1>",
        *(f'<p class="lead">{escape(remark)}</p>' for remark in remarks),
        "</header>",
        section("The arms", f'<div class="arms-side">{table_of_arms(summary)}{descriptions(summary)}</div>'),
        section("Loss", pair(_loss(summary, "tokens"), _loss(summary, "seconds"))),
        section(
            "What each loss costs",
            pair(_ratio(summary, "tokens"), _ratio(summary, "seconds")),
            _ratio_numbers(summary),
        ),
        section("Final loss and speed", pair(_final_loss(summary), _step_time(summary))),
        section("Learning rates", pair(_sweep(summary), _best_lr(summary))),
        section("Inside the models", *inside_figures({n: a.get("inspection") for n, a in summary["arms"].items()})),
        section("What the arms write", _samples(summary)),
        section("How to repeat it", _repeat(environment, summary.get("config"))),
        section("What this does not show", _limits(summary)),
    ]
    atomic_write_text(path, html_page(f"nsphere compare: {sentence}", body))


def write_inspection(inspection: Mapping[str, Any], title: str, path: Path) -> None:
    """Write the pictures of the inside of one model, for `nsphere inspect`.

    Args:
        inspection: an arm's `inspection` in the summary.
        title: which run or checkpoint this is.
        path: the HTML file to write, in a folder that exists.

    Raises:
        OSError: if the file cannot be written.
    """
    inspection = _measured(inspection)
    # The name only settles the colour, and whether sphere-only quantities are expected.
    name = "ngpt" if any(layer.get("eigen_lr_attention") for layer in inspection.get("layers", [])) else "gpt"
    body = [
        f'<header><p class="kicker">nsphere inspect</p><h1>{escape(title)}</h1></header>',
        section("Inside the model", *inside_figures({name: inspection})),
    ]
    atomic_write_text(path, html_page(f"nsphere inspect: {title}", body))


def _what_was_run(summary: Mapping[str, Any]) -> list[str]:
    environment, config = summary.get("environment") or {}, summary.get("config") or {}
    parts = ["nsphere compare"]
    if environment.get("data"):
        parts.append(f"data: {environment['data']}")
    if config.get("d_model") and config.get("num_layers"):
        parts.append(f"d_model {config['d_model']}, {config['num_layers']} layers")
    tokens = {arm["tokens"] for arm in summary["arms"].values() if arm.get("tokens")}
    if len(tokens) == 1:
        parts.append(f"{count(tokens.pop())} tokens per arm")
    if seeds := environment.get("seeds"):
        parts.append(f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}")
    if environment.get("date"):
        parts.append(str(environment["date"])[:10])
    return parts


def _loss(summary: Mapping[str, Any], against: str) -> str:
    arms = summary["arms"]
    many = any(mean_curve(arm)["num_seeds"] > 1 for arm in arms.values())
    band = " Bands span the seeds, lines are their mean." if many else ""
    if against == "tokens":
        meets = summary.get("tokens_ratio") is not None
        read = (
            "Lower is better"
            + ("; the mark shows where nGPT meets the best GPT arm’s final loss, as a ratio." if meets else ".")
            + " The fall from the untrained model is cut off at the top."
        )
    else:
        read = "The same curves on a clock: tokens divided by each arm’s tokens per second, timed interleaved."
    return figure(
        f"loss-{against}",
        f"Validation loss against {against}",
        read + band,
        [pictures.loss_picture(summary, against)],
        arms,
        missing="no validation curve with at least two evaluations"
        + (" and a measured speed" if against == "seconds" else ""),
        numbers=_loss_numbers(summary) if against == "tokens" else "",
    )


def _loss_numbers(summary: Mapping[str, Any]) -> str:
    arms = summary["arms"]
    curves = {name: mean_curve(arm) for name, arm in arms.items()}
    tokens = sorted({t for curve in curves.values() for t in curve["tokens"]})
    at = {name: dict(zip(curve["tokens"], curve["val_loss"], strict=True)) for name, curve in curves.items()}
    every = max(1, -(-len(tokens) // 40))
    lines = [
        (count(t), [f"{at[name][t]:.4f}" if t in at[name] else "–" for name in arms])
        for i, t in enumerate(tokens)
        if i % every == 0 or i == len(tokens) - 1
    ]
    return table(["tokens", *(arm_title(name, arms) for name in arms)], lines)


def _ratio(summary: Mapping[str, Any], against: str) -> str:
    arms, ratios = summary["arms"], summary.get("ratio_curve") or {}
    best = summary.get("best_gpt_arm")
    reference = arm_styles(arms)[best].title if best else "the best GPT arm"
    if against == "tokens":
        read = f"Below 1 an arm needs fewer tokens than {reference} for the same loss; a cross: it never gets lower."
    else:
        read = f"Below 1 an arm is sooner than {reference} at the same loss, with each arm’s own measured speed."
    return figure(
        f"ratio-{against}",
        f"{against.capitalize()} to reach each loss, as a ratio",
        read,
        [pictures.ratio_picture(ratios, against, arms)],
        arms,
        missing="this needs a GPT arm, another arm, and losses that both reach"
        + (" with measured speeds" if against == "seconds" else ""),
    )


def _ratio_numbers(summary: Mapping[str, Any]) -> str:
    ratios, arms = summary.get("ratio_curve") or {}, summary["arms"]
    others = list(ratios.get("arms", {}))
    if not ratios.get("loss") or not others:
        return ""
    best = arm_styles(arms)[ratios["best_gpt_arm"]].title
    every = max(1, len(ratios["loss"]) // 24)
    shown = [i for i in range(len(ratios["loss"])) if i % every == 0 or i == len(ratios["loss"]) - 1]

    def cell(name: str, i: int) -> str:
        tokens, seconds = (ratios["arms"][name][f"{key}_ratio"][i] for key in ("tokens", "seconds"))
        if tokens is None:
            lowest = ratios["arms"][name]["lowest_loss"]
            return "never" if lowest is None or lowest > ratios["loss"][i] else "–"
        return f"{tokens:.2f}" + (f" / {seconds:.2f}" if seconds is not None else "")

    lines = [
        (f"{ratios['loss'][i]:.4f}", [count(ratios["tokens"][i]), *(cell(name, i) for name in others)]) for i in shown
    ]
    head = ["loss", f"tokens, {escape(best)}", *(f"{arm_title(name, arms)}, tokens / seconds" for name in others)]
    return folded("The numbers", table(head, lines))


def _final_loss(summary: Mapping[str, Any]) -> str:
    arms = summary["arms"]
    rows = [
        (name, arm["final_val_loss"], seed_losses(arm), f"{arm['final_val_loss']:.3f}{_in_bits(arm)}")
        for name, arm in arms.items()
        if arm.get("final_val_loss") is not None
    ]
    return figure(
        "final-loss",
        "Final validation loss",
        "Lower is better; with several seeds a tick is one seed and the mark their mean.",
        [pictures.rows_picture("final-loss", "nats per token", rows, arms) if rows else ""],
        (),
        missing="no arm has a final loss",
    )


def _in_bits(arm: Mapping[str, Any]) -> str:
    return f" ({arm['bits_per_byte']:.3f} bits per byte)" if arm.get("bits_per_byte") is not None else ""


def _step_time(summary: Mapping[str, Any]) -> str:
    arms = summary["arms"]
    rows = [
        (name, arm["step_time_ms_median"], arm.get("step_time_ms_spread") or [], f"{arm['step_time_ms_median']:.4g}")
        for name, arm in arms.items()
        if arm.get("step_time_ms_median") is not None
    ]
    return figure(
        "step-time",
        "Time of one training step",
        "Shorter is better; the arms took turns in one process, so that a busy moment of the machine hits all alike.",
        [pictures.rows_picture("step-time", "milliseconds, median and spread", rows, arms) if rows else ""],
        (),
        missing="step times were not measured",
    )


def _sweep(summary: Mapping[str, Any]) -> str:
    arms = summary["arms"]
    return figure(
        "lr-sweep",
        "Final loss against learning rate",
        "Each arm’s best (ringed) should lie inside its grid, with higher losses on both sides:"
        " then no arm was held back by its learning rate.",
        [pictures.sweep_picture(arms)],
        [name for name, arm in arms.items() if arm.get("lr_sweep")],
        missing="no learning rates were swept in this run",
    )


def _best_lr(summary: Mapping[str, Any]) -> str:
    arms = summary["arms"]
    inside = {True: "yes", False: "<strong>no, at its edge</strong>", None: "–"}
    lines = [
        (
            arm_title(name, arms),
            [
                f"{arm['best_lr']:.3g}" if arm.get("best_lr") is not None else "–",
                inside[(arm.get("lr_sweep") or {}).get("best_inside_grid")],
                escape(arm.get("lr_source") or "not recorded"),
            ],
        )
        for name, arm in arms.items()
    ]
    content = table(["arm", "learning rate", "inside the grid", "where it comes from"], lines, "words")
    return block(
        "best-lr", "The learning rate of each arm", "Peak of the schedule, for the runs on this page.", content
    )


def _samples(summary: Mapping[str, Any]) -> str:
    styles = arm_styles(summary["arms"])
    parts = []
    for name, arm in summary["arms"].items():
        sample, prompt = arm.get("sample"), arm.get("sample_prompt") or ""
        if sample is None:
            text = not_available("no sample was generated")
        else:
            rest = sample.removeprefix(prompt)
            text = f'<pre tabindex="0"><b>{escape(prompt)}</b>{escape(rest)}</pre>'
        parts.append(f"<div><h3>{escape(styles[name].title)}</h3>{text}</div>")
    note = "<p>Each arm continues the same prompt (bold). One sample says little: it shows that the model runs.</p>"
    return note + f'<div class="samples">{"".join(parts)}</div>'


def _repeat(environment: Mapping[str, Any], config: Mapping[str, Any] | None) -> str:
    command = environment.get("command")
    parts = [f'<pre tabindex="0">{escape(command)}</pre>' if command else not_available("the command was not recorded")]
    facts = [(key, value) for key, value in environment.items() if key != "command" and value is not None]
    if facts:
        rows = "".join(
            f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{escape(_plain(value))}</dd>" for key, value in facts
        )
        parts.append(f'<dl class="facts">{rows}</dl>')
    if config:
        dump = escape(json.dumps(config, indent=2, ensure_ascii=False))
        parts.append(folded("Configuration", f'<pre tabindex="0">{dump}</pre>'))
    return "".join(parts)


def _limits(summary: Mapping[str, Any]) -> str:
    own = (
        "Mid-run losses: each arm ran one schedule over one horizon. Where the learning rate decays, a shorter run with"
        " a schedule of its own reaches a loss sooner than this run passed it. Ratios away from the end of the curves"
        " therefore compare schedules as well as architectures, and the ratio at the best GPT arm’s final loss sets"
        " another arm in mid-run against a GPT at the end of its schedule."
    )
    return "<ul>" + "".join(f"<li>{escape(limit)}</li>" for limit in (*(summary.get("limits") or []), own)) + "</ul>"


def _measured(value: Any) -> Any:
    """The same summary with NaN and infinities as None: not measured."""
    if isinstance(value, Mapping):
        return {key: _measured(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_measured(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
