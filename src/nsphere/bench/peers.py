"""What do other nGPT implementations need for a step of the same shape: as their users run them, and compiled?"""

import dataclasses
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from nsphere.bench import harness
from nsphere.bench.step import SIZES, Size, SizeName, make_trainers

Step = Callable[[], object]


@dataclass(frozen=True)
class Args:
    """nGPT of this library, of PyPI's nGPT-pytorch, and of ai2-olmo-core: tokens a second, by turns, one process."""

    size: SizeName = "demo"
    """As in `nsphere bench step`."""
    rounds: int = 5
    """Steps of each that count."""
    compiled: bool = True
    """Also the peers compiled by torch.compile."""
    json: Path | None = None
    """Where to write the numbers."""


def batches(size: Size, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets of one batch, at random."""
    shape = size.config.batch_size or 16, (size.config.context or 256) + 1
    tokens = torch.randint(size.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)
    return tokens[:, :-1], tokens[:, 1:]


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    """The optimizer of both peers, in its fastest form."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def ngpt_pytorch(size: Size, compiled: bool, device: str) -> Step:
    """nGPT-pytorch: fp32, as it fails under autocast; its weights projected after the step, its faster way."""
    from nGPT_pytorch import nGPT

    # 0.2.16 defines __eq__ without __hash__, and then can't be called; its module has the class's name
    for kind in vars(sys.modules[nGPT.__module__]).values():
        if isinstance(kind, type) and issubclass(kind, torch.nn.Module) and kind.__hash__ is None:
            kind.__hash__ = torch.nn.Module.__hash__
    c = size.config
    model = nGPT(
        num_tokens=size.vocab_size,
        dim=c.d_model,
        depth=c.num_layers,
        heads=c.num_heads,
        dim_head=c.d_model // c.num_heads,  # type: ignore[operator]
        ff_expand_factor=6.0,  # times 2/3: a hidden width of 4 d_model
        add_value_residual=False,
        manual_norm_weights=True,
    ).to(device)
    optimizer = adamw(model)
    model.register_step_post_hook(optimizer)
    forward = torch.compile(model) if compiled else model
    tokens, targets = batches(size, device)

    def step() -> None:
        logits = forward(tokens)
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        _finish(model, optimizer)

    return step


def olmo_core(size: Size, compiled: bool, device: str) -> Step:
    """OLMo-core: weights, optimizer state and products in bf16, which flatters it.

    It fails under autocast (its lerp wants one dtype), and its own training casts to bf16 inside FSDP.
    """
    from olmo_core.nn.attention import AttentionBackendName
    from olmo_core.nn.transformer import TransformerConfig

    c = size.config
    model = TransformerConfig.ngpt_like(
        d_model=c.d_model,
        vocab_size=size.vocab_size,
        n_layers=c.num_layers,
        n_heads=c.num_heads,
        hidden_size_multiplier=1.5,  # of 8/3 d_model: a hidden width of 4 d_model
        attn_backend=AttentionBackendName.torch,
    ).build(init_device=device)
    model.init_weights(device=torch.device(device), max_seq_len=c.context)
    model = model.to(torch.bfloat16)
    optimizer = adamw(model)
    if compiled:
        model.apply_compile()
    tokens, targets = batches(size, device)

    def step() -> None:
        model(tokens, labels=targets).loss.backward()
        _finish(model, optimizer)
        model.post_optim_step()

    return step


def _finish(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


PEERS = {"nGPT-pytorch": ngpt_pytorch, "ai2-olmo-core": olmo_core}


def main(args: Args) -> None:
    """Measure what is installed, say what is not, print, write."""
    size, device = SIZES[args.size], "cuda" if torch.cuda.is_available() else "cpu"
    preset = make_trainers(size, ("ngpt",), True)["ngpt"]
    size = dataclasses.replace(size, config=preset.config)
    steps: dict[str, Step] = {"nsphere": preset.step}
    left_out: dict[str, str] = {}
    for name, build in PEERS.items():
        for compiled in (False, True) if args.compiled else (False,):
            label = f"{name}, compiled" if compiled else f"{name}, eager"
            try:
                steps[label] = build(size, compiled, device)
                for _ in range(2):
                    steps[label]()
            except ImportError as error:
                left_out[label] = f"not installed ({error}); pip install {name}"
            except Exception as error:  # a peer's own failure is a result, not ours
                steps.pop(label, None)
                left_out[label] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    for _ in range(2):
        preset.step()
    began = time.perf_counter()
    values = harness.interleave({name: harness.milliseconds(step) for name, step in steps.items()}, args.rounds)
    num_tokens = (size.config.batch_size or 16) * (size.config.context or 256)
    results: dict[str, Any] = {"left_out": left_out, "measured_s": time.perf_counter() - began}
    rows = []
    for name in steps:
        ms = harness.quartiles(values[name]["ms"])
        ours = harness.ratios(values[name]["ms"], values["nsphere"]["ms"])
        results[name] = {"ms": ms, "tokens_per_s": 1e3 * num_tokens / ms[1], "nsphere_is_faster_by": ours}
        rows.append([name, harness.spread(ms, 0), f"{1e3 * num_tokens / ms[1]:,.0f}", harness.spread(ours)])
    header = ["implementation", "ms a step", "tokens/s", "nsphere is faster by"]
    harness.finish(f"nGPT step, {args.size}", header, rows, results, args.json)
    for label, reason in left_out.items():
        print(f"{label}: {reason}")
