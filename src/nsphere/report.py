"""The page that a comparison leaves: one self-contained HTML file that answers the question first, then shows why.

The page loads nothing and runs nothing (`page.py`); its pictures are inline SVG (`pictures.py`). A piece that was not
measured is said to be missing, in words, at its place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nsphere import pictures
from nsphere.curves import headline_ratios, mean_curve, ngpt_arm
from nsphere.drawing import arm_styles, clean, count, power_of_ten
from nsphere.page import (
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
from nsphere.train.files import atomic_write_text

EIGEN_LR = (("eigen_lr_attention", "α_A, attention"), ("eigen_lr_mlp", "α_M, MLP"))
SCALES = (("s_qk", "s_qk, queries and keys"), ("s_u", "s_u, MLP in"), ("s_v", "s_ν, MLP gate"))
MATRICES = {
    "W_q": "W_q, queries",
    "W_k": "W_k, keys",
    "W_v": "W_v, values",
    "W_o": "W_o, attention output",
    "W_u": "W_u, MLP in",
    "W_nu": "W_ν, MLP gate",
    "W_v_gate": "W_ν, MLP gate",
    "W_down": "W_down, MLP out",
}


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
        section("The arms", f'<div class="arms-side">{_table_of_arms(summary)}{_descriptions(summary)}</div>'),
        section("Loss", pair(_loss(summary, "tokens"), _loss(summary, "seconds"))),
        section(
            "What each loss costs",
            pair(_ratio(summary, "tokens"), _ratio(summary, "seconds")),
            _ratio_numbers(summary),
        ),
        section("Final loss and speed", pair(_final_loss(summary), _step_time(summary))),
        section("Learning rates", pair(_sweep(summary), _best_lr(summary))),
        section("Inside the models", *_inside({n: a.get("inspection") for n, a in summary["arms"].items()})),
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
        section("Inside the model", *_inside({name: inspection})),
    ]
    atomic_write_text(path, html_page(f"nsphere inspect: {title}", body))


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
        ours, theirs = (_seed_losses(arms[arm]) for arm in (name, best))
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


def _table_of_arms(summary: Mapping[str, Any]) -> str:
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
        losses = _seed_losses(arm)
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


def _descriptions(summary: Mapping[str, Any]) -> str:
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
        (name, arm["final_val_loss"], _seed_losses(arm), f"{arm['final_val_loss']:.3f}{_in_bits(arm)}")
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


def _inside(inspections: Mapping[str, Mapping[str, Any] | None]) -> list[str]:
    """The figures of the inside of the models; `inspections`: arm -> its inspection, or None."""
    found = {name: inspection for name, inspection in inspections.items() if inspection}
    if not found:
        return ['<p class="missing">Not available: no model was inspected.</p>']
    layers = {name: inspection.get("layers") or [] for name, inspection in found.items()}
    return [
        _eigen_lr(found, layers),
        _scales(found, layers),
        _condition_numbers(layers),
        pair(_attention_logits(layers), _norm_deviation(found)),
    ]


def _attention_logits(layers: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    lines = {name: [layer.get("max_attention_logit") for layer in own] for name, own in layers.items()}
    return figure(
        "attention-logits",
        "Largest attention logit",
        "Attention that saturates shows as logits that grow with training; QK-norm and the sphere bound them.",
        [pictures.layers_picture("attention-logits", "largest logit, before the softmax", lines)],
        layers,
        missing="attention logits were not measured",
    )


def _eigen_lr(found: Mapping[str, Any], layers: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    styles, whose = arm_styles(found), _whose(layers)
    panels = []
    for i, name in enumerate(found):
        for key, what in EIGEN_LR:
            values = [layer.get(key) for layer in layers[name]]
            panels.append(
                pictures.eigen_lr_picture(f"eigen-lr-{i}-{key}", whose[name] + what, values, styles[name].colour)
            )
    return figure(
        "eigen-lr",
        "Eigen learning rates",
        "How far each layer moves the hidden state towards what its block proposes: 0 is not at all, 1 all the way."
        " Mark: mean over the dimensions; thick: one standard deviation; thin: smallest to largest.",
        panels,
        (),
        missing="only nGPT has eigen learning rates, and no nGPT arm was inspected",
    )


def _scales(found: Mapping[str, Any], layers: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    styles, whose = arm_styles(found), _whose(layers)
    panels = []
    for i, (name, inspection) in enumerate(found.items()):
        distributions = {what: [layer.get(key) for layer in layers[name]] for key, what in (*EIGEN_LR, *SCALES)}
        distributions["s_z, vocabulary"] = [inspection.get("s_z")]
        for k, (what, values) in enumerate(distributions.items()):
            panels.append(pictures.ridges_picture(f"scales-{i}-{k}", whose[name] + what, values, styles[name].colour))
    return figure(
        "scales",
        "Distributions of the learned scales",
        "One histogram per layer, its mean as a tick; a wide one uses its freedom per dimension,"
        " a spike could have been a single number.",
        panels,
        (),
        missing="only nGPT has these scales, and no nGPT arm was inspected",
        small=True,
    )


def _whose(layers: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    """The arm's name for the titles of its panels, needed only where several arms have eigen learning rates."""
    styles = arm_styles(layers)
    several = sum(any(layer.get("eigen_lr_attention") for layer in own) for own in layers.values()) > 1
    return {name: f"{styles[name].title}: " if several else "" for name in layers}


def _norm_deviation(found: Mapping[str, Any]) -> str:
    styles = arm_styles(found)
    items = []
    for name, inspection in found.items():
        deviation = inspection.get("max_norm_deviation")
        if deviation is not None:
            verdict = "within" if deviation <= 1e-6 else "<strong>above</strong>"
            items.append(
                f'<p><span class="big">{power_of_ten(deviation, 2)}</span> {escape(styles[name].title)}: '
                f"{verdict} the limit of 10⁻⁶ that holds after every step.</p>"
            )
    return block(
        "norm-deviation",
        "Distance from the hypersphere",
        "The largest |‖w‖ − 1| over every row or column that belongs on the sphere; rounding to fp32 alone gives"
        " about 10⁻⁷.",
        "".join(items) or not_available("no arm keeps its matrices on the hypersphere, or it was not measured"),
    )


def _condition_numbers(layers: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    every = [layer.get("condition_numbers") or {} for own in layers.values() for layer in own]
    matrices = list(dict.fromkeys(matrix for numbers in every for matrix in numbers))
    values = [v for numbers in every for v in numbers.values() if v is not None and 0 < v < float("inf")]
    panels = []
    for i, matrix in enumerate(matrices):
        lines = {
            name: [(layer.get("condition_numbers") or {}).get(matrix) for layer in own] for name, own in layers.items()
        }
        limits = (min(values) / 1.5, max(values) * 1.5) if values else None
        title = clean(MATRICES.get(matrix, matrix))
        panels.append(pictures.layers_picture(f"condition-{i}", title, lines, True, limits, (230, 190)))
    return figure(
        "condition-numbers",
        "Condition numbers of the matrices",
        "Largest over smallest singular value, by layer: the higher, the closer a matrix is to having lost directions."
        " The scale is logarithmic and the same in every panel.",
        panels,
        layers,
        missing="condition numbers were not measured",
        small=True,
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


def _seed_losses(arm: Mapping[str, Any]) -> list[float]:
    losses = [seed.get("final_val_loss") for seed in (arm.get("seeds") or {}).values()]
    return [loss for loss in losses if loss is not None]


def _loss_text(arm: Mapping[str, Any], unit: str = " nats per token") -> str:
    loss = arm.get("final_val_loss")
    return "no finite loss" if loss is None else f"{loss:.3f}{unit}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
