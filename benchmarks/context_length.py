"""Loss by context length, of runs trained at a short one: one JSON and one picture of what `nsphere eval --out` wrote.

For each run `nsphere eval RUN --contexts 16 32 64 128 256 512 --out RUN.json`, then

    python benchmarks/context_length.py RUN.json... --json benchmarks/results/context_length.json --png picture.png
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from nsphere.bench.harness import finish


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("evaluations", type=Path, nargs="+", help="JSON files of nsphere eval --out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    args = parser.parse_args()
    results, rows, trained = {}, [], None
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for path in args.evaluations:
        content = json.loads(path.read_text())
        config = json.loads((Path(content["run"]) / "config.json").read_text())
        arm, trained = config["arm"], config["model"]["context"]
        results[arm] = {"model": config["model"], "train": config["train"], "results": content["results"]}
        lengths = [r["context"] for r in content["results"]]
        losses = [r["loss"] for r in content["results"]]
        at_trained = losses[lengths.index(trained)]
        axes.plot(lengths, losses, marker="o", label={"ngpt": "nGPT", "gpt-qknorm": "GPT + QK-norm"}.get(arm, arm))
        rows += [
            [arm, str(n), f"{loss:.3f}", f"{loss - at_trained:+.3f}"] for n, loss in zip(lengths, losses, strict=True)
        ]
    axes.axvline(trained, color="grey", linestyle=":", label=f"trained at {trained}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.set(xlabel="context, tokens", ylabel="validation loss, nats per token")
    axes.legend()
    if args.png is not None:
        figure.savefig(args.png, dpi=120)
    finish("loss by context length", ["arm", "context", "loss", "over the trained context's"], rows, results, args.json)


if __name__ == "__main__":
    main()
