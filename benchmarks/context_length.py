"""Loss by context length, of runs trained at a short one: one JSON and one picture of what `nsphere eval --out` wrote.

For each arm and seed `nsphere train …`, then `nsphere eval RUN --contexts 16 32 64 128 256 512 --out RUN.json`, then

    python benchmarks/context_length.py RUN.json... --json benchmarks/results/context_length.json --png picture.png

Lines are means over the seeds, bands and brackets their smallest and largest.
"""

import argparse
import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from nsphere.bench.harness import finish
from nsphere.report.drawing import ArmStyle, arm_styles


def read(paths: list[Path]) -> dict[str, dict]:
    """By arm: its model, how it was trained, and by seed its losses by context."""
    arms: dict[str, dict] = {}
    for path in paths:
        content = json.loads(path.read_text())
        config = json.loads((Path(content["run"]) / "config.json").read_text())
        train, model = config["train"], config["model"]
        losses = {str(r["context"]): r["loss"] for r in content["results"]}
        arm = arms.setdefault(config["arm"], {"model": model, "train": train, "losses": {}})
        if arm["model"] != model or arm["train"] | {"seed": None} != train | {"seed": None}:
            raise SystemExit(
                f"{path}: {config['arm']} was trained otherwise than in the files before; compare like runs"
            )
        arm["losses"][str(train["seed"])] = losses
    return arms


def rises(arm: dict) -> dict[str, list[float]]:
    """By context: what each seed loses over its loss at the trained one."""
    seeds, trained = arm["losses"].values(), str(arm["model"]["context"])
    return {n: [losses[n] - losses[trained] for losses in seeds] for n in next(iter(seeds))}


def losses_by_context(arm: dict) -> dict[str, list[float]]:
    """By context: the loss of each seed."""
    seeds = arm["losses"].values()
    return {n: [losses[n] for losses in seeds] for n in next(iter(seeds))}


def draw(axes, values: dict[str, list[float]], style: ArmStyle) -> None:
    """The mean as a line, the seeds' range as a band."""
    lengths, means = [int(n) for n in values], [statistics.mean(v) for v in values.values()]
    lowest, highest = [min(v) for v in values.values()], [max(v) for v in values.values()]
    dashes = (0, style.dashes) if style.dashes else "-"
    axes.plot(lengths, means, color=style.colour, linestyle=dashes, marker=style.marker, ms=4, label=style.title)
    axes.fill_between(lengths, lowest, highest, color=style.colour, alpha=0.2, lw=0)


def spread(values: list[float], form: str) -> str:
    """A mean with the seeds' range: 1.42 [1.41, 1.44]."""
    return f"{statistics.mean(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("evaluations", type=Path, nargs="+", help="JSON files of nsphere eval --out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    args = parser.parse_args()
    arms = read(args.evaluations)
    styles, rows = arm_styles(arms), []
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, arm in arms.items():
        losses, over = losses_by_context(arm), rises(arm)
        draw(left, losses, styles[name])
        draw(right, over, styles[name])
        rows += [[name, n, spread(losses[n], ".3f"), spread(over[n], "+.3f")] for n in losses]
    trained = arm["model"]["context"]
    for axes in (left, right):
        axes.axvline(trained, color="grey", linestyle=":", label=f"trained at {trained}")
        axes.set_xscale("log", base=2)
        axes.set_xticks([int(n) for n in losses], list(losses))
        axes.set_xlabel("context, tokens")
        axes.spines[["top", "right"]].set_visible(False)
    left.set_title("validation loss, nats per token", loc="left", fontsize=10)
    right.set_title("over the loss at the trained context", loc="left", fontsize=10)
    left.legend(frameon=False)
    if args.png is not None:
        figure.savefig(args.png, dpi=120)
    header = ["arm", "context", "loss", "over the trained context's"]
    finish("loss by context length", header, rows, arms, args.json)


if __name__ == "__main__":
    main()
