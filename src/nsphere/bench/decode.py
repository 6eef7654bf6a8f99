"""What does generation cost: tokens a second while reading a prompt, milliseconds a token afterwards?"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from nsphere.bench import harness
from nsphere.bench.step import SIZES, SizeName
from nsphere.fold import fold
from nsphere.generate import Sampling, generate
from nsphere.layers import Decoder
from nsphere.presets import make_model
from nsphere.train.config import DtypeName, TrainConfig, model_config, resolve
from nsphere.train.machine import choose_device
from nsphere.train.precision import autocast, choose_dtype, dtype_name

ARMS = ("gpt-qknorm", "ngpt")


@dataclass(frozen=True)
class Args:
    """nGPT over GPT + QK-norm in generation, one row, greedy, by turns."""

    size: SizeName = "d512"
    """As in `nsphere bench step`."""
    prompt_tokens: int | None = None
    """Length of the prompt; half the context if not given."""
    new_tokens: int = 64
    """Tokens made after it."""
    rounds: int = 7
    """Runs of each that count."""
    eager: bool = False
    """Do not compile the steps."""
    dtype: DtypeName = "auto"
    """As in `nsphere bench step`."""
    json: Path | None = None
    """Where to write the numbers."""


def main(args: Args) -> None:
    """Measure, print, write."""
    size, device = SIZES[args.size], choose_device("auto")
    autocast_dtype = choose_dtype(TrainConfig(dtype=args.dtype), device)
    context = resolve("ngpt", size.config).context
    assert context is not None
    length = context // 2 if args.prompt_tokens is None else args.prompt_tokens
    prompt = torch.randint(size.vocab_size, (length,), generator=torch.Generator().manual_seed(0)).tolist()

    def candidate(model: Decoder) -> Callable[[], dict[str, float]]:
        def read() -> None:
            next(iter(generate(model, prompt, 1, Sampling(temperature=0), compile=not args.eager)))

        def read_and_go_on() -> None:
            for _ in generate(model, prompt, args.new_tokens + 1, Sampling(temperature=0), compile=not args.eager):
                pass

        def run() -> dict[str, float]:
            with autocast(device, autocast_dtype):
                prefill = harness.milliseconds(read)()["ms"]
                whole = harness.milliseconds(read_and_go_on)()["ms"]
            return {"prefill": prefill, "token": (whole - prefill) / args.new_tokens}

        return run

    models = {
        arm: fold(make_model(model_config(arm, resolve(arm, size.config), size.vocab_size)).to(device)) for arm in ARMS
    }
    candidates = {arm: candidate(model) for arm, model in models.items()}
    for run in candidates.values():
        run()
    values = harness.interleave(candidates, args.rounds)
    results, rows = {}, []
    for arm in ARMS:
        prefill, token = (harness.quartiles(values[arm][key]) for key in ("prefill", "token"))
        over = {key: harness.ratios(values[arm][key], values[ARMS[0]][key]) for key in ("prefill", "token")}
        rate = 1e3 * length / prefill[1]
        results[arm] = {
            "dtype": dtype_name(autocast_dtype),
            "prefill_ms": prefill,
            "prefill_tokens_per_s": rate,
            "token_ms": token,
            "prefill_over_gpt_qknorm": over["prefill"],
            "token_over_gpt_qknorm": over["token"],
        }
        rows.append(
            [arm, f"{rate:,.0f}", harness.spread(over["prefill"]), harness.spread(token), harness.spread(over["token"])]
        )
    header = ["arm", "prefill tokens/s", "time over gpt-qknorm", "ms a token", "over gpt-qknorm"]
    how = "eager" if args.eager else "compiled"
    title = f"generation, {args.size}, {how}, {dtype_name(autocast_dtype)}"
    harness.finish(title, header, rows, results, args.json)
