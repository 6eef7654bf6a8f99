"""The pictures of a report, one function each: what is drawn from which numbers, and what it says in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib import ticker
from matplotlib.axes import Axes

from nsphere.report.curves import is_finite, mean_curve, tokens_to_reach
from nsphere.report.drawing import INK, MUTED, arm_styles, count, line, picture, power_of_ten


def loss_picture(summary: Mapping[str, Any], against: str) -> str:
    """Validation loss of every arm against `"tokens"` or `"seconds"`; empty where there is nothing to draw."""
    curves = {}
    for name, arm in summary["arms"].items():
        curve, rate = mean_curve(arm), 1.0
        if against == "seconds":
            rate = arm.get("tokens_per_second") or 0.0
        if len(curve["tokens"]) > 1 and rate:
            curves[name] = curve | {"x": [t / rate for t in curve["tokens"]]}
    if not curves:
        return ""
    styles = arm_styles(summary["arms"])
    end = max(curve["x"][-1] for curve in curves.values())
    # The fall from the untrained model would press the part that is compared into a line at the bottom.
    shown = [
        loss
        for curve in curves.values()
        for x, loss in zip(curve["x"], curve["val_loss"], strict=True)
        if x >= 0.1 * end
    ] or [loss for curve in curves.values() for loss in curve["val_loss"]]
    bottom = min(min(curve["low"]) for curve in curves.values())
    top = max(shown)
    margin = 0.05 * (top - bottom) or 0.05

    def draw(axes: Axes) -> None:
        for name, curve in curves.items():
            style = styles[name]
            axes.plot(curve["x"], curve["val_loss"], **line(style), markevery=_every(curve["x"]), label=name)
            if curve["num_seeds"] > 1:
                axes.fill_between(curve["x"], curve["low"], curve["high"], color=style.colour, alpha=0.2, linewidth=0)
        axes.set(xlim=(0, end * 1.02), ylim=(bottom - margin, top + margin))
        axes.set_xlabel({"tokens": "tokens trained on", "seconds": "seconds, at the measured speed"}[against])
        axes.set_title("validation loss, nats per token", color=MUTED)
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: count(x)))
        axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
        ratio = summary.get(f"{against}_ratio")
        best = summary.get("best_gpt_arm")
        if ratio and best in curves and "ngpt" in curves:
            _bracket(axes, curves["ngpt"], curves[best], ratio)

    label = f"Validation loss against {against}. " + "; ".join(
        f"{styles[name].title} falls to {curve['val_loss'][-1]:.3f} at {count(curve['x'][-1])} {against}"
        for name, curve in curves.items()
    )
    return picture(f"loss-{against}", label + ".", 460, 320, draw)


def ratio_picture(ratios: Mapping[str, Any], against: str, names: Iterable[str]) -> str:
    """What each arm needs to reach each loss over what the best GPT arm needed; empty where nothing can be drawn."""
    styles = arm_styles(names)
    xs = ratios.get(against) or []
    lines = {}
    for name, arm in ratios.get("arms", {}).items():
        points = [(x, y) for x, y in zip(xs, arm[f"{against}_ratio"], strict=True) if x is not None and y is not None]
        if points:
            lines[name] = points
    if not lines:
        return ""
    best = styles[ratios["best_gpt_arm"]]
    values = [y for points in lines.values() for _, y in points]
    low, high = min(0.8, *values), min(max(1.25, *values), 4.0)

    def draw(axes: Axes) -> None:
        axes.axhline(1.0, **{**line(best), "marker": ""})
        for name, points in lines.items():
            style = styles[name]
            x, y = zip(*points, strict=True)
            axes.plot(x, y, **line(style), markevery=0.1)
            if ratios["arms"][name][f"{against}_ratio"][-1] is None:
                axes.plot(x[-1], y[-1], marker="x", color=style.colour, markersize=9, markeredgewidth=2)
        axes.set_yscale("log")
        axes.set(xlim=(0, xs[-1] * 1.02), ylim=(low / 1.06, high * 1.06))
        axes.yaxis.set_major_locator(ticker.FixedLocator([t for t in _RATIO_TICKS if low / 1.06 <= t <= high * 1.06]))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:g}×"))
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: count(x)))
        axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
        axes.set_xlabel(f"{against} that {best.title} needed")
        _loss_axis(axes, xs, ratios["loss"])

    label = f"{against.capitalize()} needed to reach each loss, as a ratio to {best.title}. " + "; ".join(
        f"{styles[name].title}: {points[0][1]:.2f} at the first loss, {points[-1][1]:.2f} at the last reached"
        for name, points in lines.items()
    )
    return picture(f"ratio-{against}", label + ".", 460, 320, draw)


_RATIO_TICKS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)


def rows_picture(
    name: str, unit: str, rows: Sequence[tuple[str, float, Sequence[float], str]], arms: Iterable[str]
) -> str:
    """One row per arm: a value with its number beside it, and the values that it stands for.

    Args:
        name: prefix of the ids inside.
        unit: what is drawn and in which unit.
        rows: arm, its value, single values (seeds) or the two ends of a range around it, and the words beside it.
        arms: all arms of the comparison, which settle the styles.
    """
    styles = arm_styles(arms)
    everything = [value for _, middle, around, _ in rows for value in (middle, *around)]
    low, high = min(everything), max(everything)
    margin = 0.08 * (high - low) or 0.05 * abs(high)

    def draw(axes: Axes) -> None:
        for y, (arm, middle, around, words) in enumerate(rows):
            style = styles[arm]
            if len(around) > 1:
                axes.plot([min(around), max(around)], [y, y], color=style.colour, linewidth=2, alpha=0.45)
                axes.plot(around, [y] * len(around), "|", color=style.colour, markersize=11, markeredgewidth=1.6)
            axes.plot(middle, y, style.marker, color=style.colour, markersize=8)
            side = "left" if middle < (low + high) / 2 else "right"
            axes.annotate(
                words,
                (middle, y),
                xytext=(-4 if side == "left" else 4, 9),
                textcoords="offset points",
                ha=side,
                color=INK,
            )
        axes.set_yticks(range(len(rows)), [styles[arm].title for arm, *_ in rows], color=INK)
        axes.set(ylim=(len(rows) - 0.5, -0.75), xlim=(low - margin, high + margin))
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(4))
        axes.set_xlabel(unit)

    label = f"{unit}: " + "; ".join(f"{styles[arm].title} {words}" for arm, _, _, words in rows)
    return picture(name, label + ".", 460, 70 + 44 * len(rows), draw)


def sweep_picture(arms: Mapping[str, Mapping[str, Any]]) -> str:
    """Final loss of every learning rate that was tried; empty where no arm has a sweep."""
    styles = arm_styles(arms)
    sweeps = {}
    for name, arm in arms.items():
        if sweep := arm.get("lr_sweep"):
            points = sorted(zip(sweep["lr"], sweep["val_loss"], strict=True))
            if any(is_finite(loss) for _, loss in points):
                sweeps[name] = points
    if not sweeps:
        return ""
    losses = [loss for points in sweeps.values() for _, loss in points if is_finite(loss)]
    bottom, top = min(losses), min(max(losses), 1.3 * min(losses))
    margin = 0.06 * (top - bottom) or 0.05

    def draw(axes: Axes) -> None:
        for name, points in sweeps.items():
            style = styles[name]
            finite = [(lr, loss) for lr, loss in points if is_finite(loss)]
            axes.plot(*zip(*finite, strict=True), **line(style))
            lr, loss = min(finite, key=lambda point: point[1])
            axes.plot(
                lr, loss, "o", markersize=13, markerfacecolor="none", markeredgecolor=style.colour, markeredgewidth=1.6
            )
            failed = [lr for lr, loss in points if not is_finite(loss)]
            axes.plot(failed, [top] * len(failed), "x", color=style.colour, markersize=8, markeredgewidth=2)
        axes.set_xscale("log")
        axes.set_ylim(bottom - margin, top + margin)
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 3.0)))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: power_of_ten(x)))
        axes.set_xlabel("peak learning rate")
        axes.set_title("final validation loss, nats per token", color=MUTED)

    label = "Final loss against learning rate. " + "; ".join(
        "{}: best {:.4g} at {:.2g}".format(styles[name].title, *min((y, x) for x, y in points if is_finite(y)))
        for name, points in sweeps.items()
    )
    return picture("sweep", label + ".", 460, 320, draw)


def layers_picture(
    name: str,
    title: str,
    lines: Mapping[str, Sequence[float | None]],
    log: bool = False,
    limits: tuple[float, float] | None = None,
    size: tuple[float, float] = (460, 300),
) -> str:
    """One value per layer and arm; empty where there is none.

    Args:
        name: prefix of the ids inside.
        title: what the values are.
        lines: arm -> one value per layer, None where it was not measured.
        log: a logarithmic value axis.
        limits: of the value axis, to share it between panels.
        size: natural width and height in CSS pixels.
    """
    styles = arm_styles(lines)
    points = {arm: [(i, v) for i, v in enumerate(values) if is_finite(v)] for arm, values in lines.items()}
    points = {arm: values for arm, values in points.items() if values}
    if not points:
        return ""

    everything = [v for values in points.values() for _, v in values]

    def draw(axes: Axes) -> None:
        for arm, values in points.items():
            xs, ys = zip(*values, strict=True)
            axes.plot(xs, ys, **line(styles[arm]), markevery=_every(xs))
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: power_of_ten(y)))
            axes.yaxis.set_minor_locator(ticker.NullLocator())
            low, high = limits or (min(everything), max(everything))
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0,) if high > 30 * low else (1.0, 2.0, 5.0)))
        else:
            axes.set_ylim(bottom=0)
        if limits:
            axes.set_ylim(limits)
        _layer_axis(axes.xaxis, max(len(values) for values in lines.values()))
        axes.set_xlabel("layer")
        axes.set_title(title)

    label = f"{title} per layer. " + "; ".join(
        f"{styles[arm].title} from {min(v for _, v in values):.3g} to {max(v for _, v in values):.3g}"
        for arm, values in points.items()
    )
    return picture(name, label + ".", *size, draw)


def eigen_lr_picture(name: str, title: str, layers: Sequence[Mapping[str, Any] | None], colour: str) -> str:
    """Mean, one standard deviation (thick) and range (thin) of a vector scale in each layer."""
    measured = [(i, layer) for i, layer in enumerate(layers) if layer]
    if not measured:
        return ""

    def draw(axes: Axes) -> None:
        for i, layer in measured:
            mean, std = layer["mean"], layer["std"]
            axes.plot([i, i], [layer["min"], layer["max"]], color=colour, linewidth=1)
            axes.plot([i, i], [mean - std, mean + std], color=colour, linewidth=5, alpha=0.45)
        xs = [i for i, _ in measured]
        axes.plot(xs, [layer["mean"] for _, layer in measured], "D-", color=colour, linewidth=1.4, markersize=6)
        axes.set_ylim(bottom=min(0.0, *(layer["min"] for _, layer in measured)))
        axes.set_xlim(-0.5, len(layers) - 0.5)
        _layer_axis(axes.xaxis, len(layers))
        axes.set_xlabel("layer")
        axes.set_title(title)

    label = f"{title}, mean per layer: " + ", ".join(f"{layer['mean']:.3g}" for _, layer in measured)
    return picture(name, label + ".", 460, 280, draw)


def ridges_picture(name: str, title: str, layers: Sequence[Mapping[str, Any] | None], colour: str) -> str:
    """The histogram of a vector scale in each layer, one above the other, with its mean as a tick."""
    measured = [(i, layer) for i, layer in enumerate(layers) if layer and layer.get("histogram")]
    if not measured:
        return ""
    single = len(layers) == 1

    def draw(axes: Axes) -> None:
        for i, layer in measured:
            edges, counts = layer["histogram"]["edges"], layer["histogram"]["counts"]
            tallest = max(counts) or 1
            base = len(layers) - 1 - i
            axes.stairs(
                [base + 0.85 * c / tallest for c in counts], edges, baseline=base, fill=True, color=colour, alpha=0.55
            )
            axes.plot([layer["mean"]] * 2, [base, base + 0.9], color=INK, linewidth=1.4)
        axes.set_ylim(0, len(layers))
        if single:
            axes.set_yticks([])
        else:
            shown = range(0, len(layers), math.ceil(len(layers) / 12))
            axes.set_yticks([len(layers) - 1 - i for i in shown], [str(i) for i in shown])
        axes.xaxis.set_major_locator(ticker.MaxNLocator(3))
        axes.set_title(title)

    label = f"Distribution of {title}, " + ", ".join(
        ("" if single else f"layer {i} ") + f"mean {layer['mean']:.3g} in {layer['min']:.3g} to {layer['max']:.3g}"
        for i, layer in measured
    )
    return picture(name, label + ".", 230, 64 + min(26 * max(len(layers), 4), 320), draw)


def _every(xs: Sequence[float]) -> int:
    """About a dozen markers along a line, however many points it has."""
    return max(1, len(xs) // 12)


def _layer_axis(axis: Any, num_layers: int) -> None:
    axis.set_major_locator(ticker.FixedLocator(list(range(0, num_layers, math.ceil(num_layers / 8)))))
    axis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:.0f}"))


def _bracket(axes: Axes, ours: Mapping[str, Any], theirs: Mapping[str, Any], ratio: float) -> None:
    """A line at the best GPT arm's final loss, from where nGPT gets there to where that arm does."""
    target = theirs["val_loss"][-1]
    a, b = (tokens_to_reach(curve["x"], curve["val_loss"], target) for curve in (ours, theirs))
    if a is None or b is None:
        return
    axes.plot([a, b], [target, target], color=INK, linewidth=1.2, marker="|", markersize=9, markeredgewidth=1.4)
    # Left of the earlier crossing and below the line: both curves are above it there.
    axes.annotate(
        f"{ratio:.2f}×",
        (min(a, b), target),
        xytext=(-6, -14),
        textcoords="offset points",
        ha="right",
        color=INK,
        weight="bold",
    )


def _loss_axis(axes: Axes, xs: Sequence[float], losses: Sequence[float]) -> None:
    """A second axis above: the loss that the best GPT arm had reached at the ticks below."""
    low, high = axes.get_xlim()
    ticks = [x for x in axes.get_xticks() if max(low, xs[0]) <= x <= high]
    above = axes.secondary_xaxis("top")
    above.set_ticks(ticks, [f"{_loss_at(x, xs, losses):.2f}" for x in ticks])
    above.spines["top"].set_visible(False)
    above.tick_params(length=0, pad=2)
    above.set_xlabel("loss to reach, nats per token")


def _loss_at(x: float, xs: Sequence[float], losses: Sequence[float]) -> float:
    for (x0, y0), (x1, y1) in zip(zip(xs, losses, strict=True), list(zip(xs, losses, strict=True))[1:], strict=False):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y1
    return losses[-1]
