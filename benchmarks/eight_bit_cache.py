"""What eight bits in the cache cost a trained model: error of keys, values and logits, and the loss.

    python benchmarks/eight_bit_cache.py RUN... --json benchmarks/results/eight_bit_cache.json

Each run reads windows of its own validation text through its cache, a token's attention seeing what was stored. "fixed"
stores keys without a scale of their own: int8 as round(127 x), fp8 as 256 x, which only unit vectors allow.
"""

import argparse
import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F

from nsphere.bench.harness import finish
from nsphere.kv_cache import Vectors
from nsphere.train.data import DataConfig, load_corpus, val_batches
from nsphere.train.saved import load_run
from nsphere.train.token_cache import data_cache


class FixedInt8(Vectors):
    """Keys as round(127 x), without a scale."""

    def __init__(self, shape, device):
        super().__init__(shape, "int8", device, unit=True)
        self.scales = None

    def _encode(self, x, scale):
        return (x.float() * 127).round().clamp(-127, 127).to(torch.int8)

    def read(self, end, dtype):
        return (self.codes[:, :end].float() / 127).to(dtype)


def make_cache(model, rows, tokens, dtype, fixed):
    cache = model.make_cache(rows, tokens, dtype)
    if dtype in ("int8", "fp8"):
        shape = (rows, tokens, model.config.num_kv_heads, model.config.head_dim)
        device = model.device
        for i, (_, v) in enumerate(cache.layers):
            k = FixedInt8(shape, device) if fixed and dtype == "int8" else Vectors(shape, dtype, device, unit=fixed)
            cache.layers[i] = k, v
    return cache


@torch.no_grad()
def measure(run, num_windows):
    model, context = run.model, run.model.config.context
    folded = run.folded().float()
    corpus = load_corpus(DataConfig(**run.config["data"]), cache_dir=data_cache())
    batches = val_batches(corpus.val, context=context, batch_size=32, num_sequences=num_windows)
    found = {}
    kinds = [(torch.float32, False), (torch.bfloat16, False), ("int8", False), ("fp8", False)]
    kinds += [("int8", True), ("fp8", True)] if folded.unit_keys else []
    for dtype, fixed in kinds:
        name = str(dtype).removeprefix("torch.") + (", keys fixed" if fixed else "")
        loss, error, norm, kv, num_tokens = 0.0, 0.0, 0.0, [[0.0, 0.0], [0.0, 0.0]], 0
        for inputs, targets, _ in batches:
            exact_cache = make_cache(folded, len(inputs), context, torch.float32, False)
            exact = folded(inputs, cache=exact_cache)
            cache = make_cache(folded, len(inputs), context, dtype, fixed)
            logits = folded(inputs, cache=cache)
            loss += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
            num_tokens += targets.numel()
            error += (logits - exact).square().sum().item()
            norm += exact.square().sum().item()
            # of the first layer, whose keys and values are the same before they are stored
            for part, stored, true in zip(kv, cache.layers[0], exact_cache.layers[0], strict=True):
                true = true.read(context, torch.float32)
                part[0] += (stored.read(context, torch.float32) - true).square().sum().item()
                part[1] += true.square().sum().item()
        found[name] = {
            "bytes_per_key": cache.layers[0][0].num_bytes() / (len(inputs) * context * model.config.num_kv_heads),
            "key_error": (kv[0][0] / kv[0][1]) ** 0.5,
            "value_error": (kv[1][0] / kv[1][1]) ** 0.5,
            "logit_error": (error / norm) ** 0.5,
            "loss": loss / num_tokens,
        }
    return {"arm": run.config["arm"], "model": dataclasses.asdict(model.config), "step": run.step, "caches": found}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = {path.name: measure(load_run(path, torch.device("cpu")), args.windows) for path in args.runs}
    rows = []
    for name, result in results.items():
        exact = result["caches"]["float32"]["loss"]
        for kind, c in result["caches"].items():
            errors = [f"{100 * c[key]:.2f}%" for key in ("key_error", "value_error", "logit_error")]
            rows.append(
                [name, kind, f"{c['bytes_per_key']:g}", *errors, f"{c['loss']:.4f}", f"{c['loss'] - exact:+.5f}"]
            )
    header = ["run", "cache", "bytes a key", "key error", "value error", "logit error", "loss", "over fp32's"]
    finish("eight-bit cache", header, rows, results, args.json)


if __name__ == "__main__":
    main()
