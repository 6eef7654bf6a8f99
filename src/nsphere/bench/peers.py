"""What do other nGPT implementations need for a step of the same shape: as their own scripts run them, and compiled?"""

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
from nsphere.train.config import DtypeName

Step = Callable[[], object]

OURS, PRODUCTS = "nsphere", "the step's matrix products alone"


@dataclass(frozen=True)
class Args:
    """nGPT of this library, of PyPI's nGPT-pytorch, and of ai2-olmo-core: tokens a second, by turns, one process.

    The products alone, of the same shapes and dtype, say how much faster than a peer anything could be.
    """

    size: SizeName = "demo"
    """As in `nsphere bench step`."""
    rounds: int = 5
    """Steps of each that count."""
    dtype: DtypeName = "auto"
    """As in `nsphere bench step`; a peer that can't have it says in its name what it has instead."""
    only_scripts: bool = False
    """The peers only as their own scripts run them."""
    json: Path | None = None
    """Where to write the numbers."""


def batches(size: Size, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets of one batch, at random."""
    shape = size.config.batch_size or 16, (size.config.context or 256) + 1
    tokens = torch.randint(size.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)
    return tokens[:, :-1], tokens[:, 1:]


def ngpt_pytorch(size: Size, device: str, *, parametrized: bool, compiled: bool) -> Step:
    """nGPT-pytorch in fp32, as it fails under autocast.

    Its train.py (commit 8be11d3) is eager, has every weight normalised in the forward pass (`USE_PARAMETRIZE = True`),
    torch's Adam as it comes, and no clipping. The other way projects after the step, with AdamW fused, and clips.
    """
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
        manual_norm_weights=not parametrized,
    ).to(device)
    optimizer: torch.optim.Optimizer
    if parametrized:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    else:
        optimizer = fused_adamw(model)
        model.register_step_post_hook(optimizer)
    forward = torch.compile(model) if compiled else model
    tokens, targets = batches(size, device)

    def step() -> None:
        logits = forward(tokens)
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        finish(model, optimizer, clip=not parametrized)

    return step


def olmo_core(size: Size, device: str, *, low: bool, compiled: bool) -> Step:
    """OLMo-core, whose script for nGPT (src/examples/ngpt/train.py, commit 138b1fc) compiles: `compile_model=True`.

    With `low` its weights, optimizer state and products are all in bf16, which flatters it: it fails under autocast
    (its lerp wants one dtype), and its script has FSDP cast to bf16 from fp32 weights, which one process does not do.
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
    model = model.to(torch.bfloat16 if low else torch.float32)
    optimizer = fused_adamw(model)
    if compiled:
        model.apply_compile()
    tokens, targets = batches(size, device)

    def step() -> None:
        model(tokens, labels=targets).loss.backward()
        finish(model, optimizer)
        model.post_optim_step()

    return step


def fused_adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    """The optimizer of both peers, in its fastest form."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def finish(model: torch.nn.Module, optimizer: torch.optim.Optimizer, clip: bool = True) -> None:
    """What comes after the gradients."""
    if clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def products(size: Size, device: str, dtype: torch.dtype) -> Step:
    """A step's matrix products and no more: per weight one forward and two backward, and the two of causal attention.

    Of attention half of the scores are computed, forward once and backward two and a half times, as flash attention
    has it. Operands lie in the order of a layer's own products, of the shapes of a step, in `dtype`.
    """
    c = size.config
    assert c.d_model and c.num_layers and c.num_heads and c.batch_size and c.context
    d, num_tokens, width = c.d_model, c.batch_size * c.context, c.d_mlp or 4 * c.d_model
    shapes = [(d, d)] * 4 + [(width, d)] * 2 + [(d, width)]  # W_q, W_k, W_v, W_o; W_u, W_ν; W_down

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    layer = [(random(num_tokens, n), random(m, n), random(num_tokens, m)) for m, n in shapes]
    head = [(random(num_tokens, d), random(size.vocab_size, d), random(num_tokens, size.vocab_size))]
    heads = c.batch_size * c.num_heads
    q, k = (random(heads, c.context // 2, d // c.num_heads) for _ in range(2))
    k = torch.cat((k, k), 1)  # half the rows of all columns: as many products as below the diagonal
    scores = random(heads, c.context // 2, c.context)

    def linear(operands: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
        for x, w, grad in operands:
            x @ w.t()
            grad @ w
            grad.t() @ x

    def step() -> None:
        for _ in range(c.num_layers):  # type: ignore[arg-type]
            linear(layer)
            for _ in range(3):  # q·k, again in the backward, and the gradient of the probabilities
                q @ k.mT
            for _ in range(2):  # attention's output, and the gradient of q
                scores @ k
            for _ in range(2):  # the gradients of k and v
                scores.mT @ q
        linear(head)

    return step


def candidates(size: Size, device: str, low: bool, only_scripts: bool) -> dict[str, Callable[[], Step]]:
    """What builds each peer's step, by what the table calls it."""
    dtype = "bf16" if low else "fp32"
    found: dict[str, Callable[[], Step]] = {
        "nGPT-pytorch, as its train.py (eager, norms in the forward; fp32)": lambda: ngpt_pytorch(
            size, device, parametrized=True, compiled=False
        ),
        f"ai2-olmo-core, as its ngpt/train.py (compiled; all in {dtype})": lambda: olmo_core(
            size, device, low=low, compiled=True
        ),
    }
    if not only_scripts:
        found |= {
            "nGPT-pytorch, eager, norms after the step (fp32)": lambda: ngpt_pytorch(
                size, device, parametrized=False, compiled=False
            ),
            "nGPT-pytorch, compiled, norms after the step (fp32)": lambda: ngpt_pytorch(
                size, device, parametrized=False, compiled=True
            ),
            f"ai2-olmo-core, eager (all in {dtype})": lambda: olmo_core(size, device, low=low, compiled=False),
        }
    return found


def main(args: Args) -> None:
    """Measure what is installed, say what is not, print, write."""
    size, device = SIZES[args.size], "cuda" if torch.cuda.is_available() else "cpu"
    ours = make_trainers(size, ("ngpt",), True, args.dtype)["ngpt"]
    size = dataclasses.replace(size, config=ours.config)
    low = ours.autocast_dtype is not None
    steps: dict[str, Step] = {OURS: ours.step}
    left_out: dict[str, str] = {}
    for label, build in candidates(size, device, low, args.only_scripts).items():
        try:
            steps[label] = build()
            for _ in range(2):
                steps[label]()
        except ImportError as error:
            left_out[label] = f"not installed ({error}); pip install {label.partition(',')[0]}"
        except Exception as error:  # a peer's own failure is a result, not ours
            steps.pop(label, None)
            left_out[label] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    steps[PRODUCTS] = products(size, device, ours.autocast_dtype or torch.float32)
    for _ in range(2):
        ours.step()
        steps[PRODUCTS]()
    began = time.perf_counter()
    values = harness.interleave({name: harness.milliseconds(step) for name, step in steps.items()}, args.rounds)
    num_tokens = ours.tokens_per_step
    results: dict[str, Any] = {
        "dtype": ours.dtype_name,
        "left_out": left_out,
        "measured_s": time.perf_counter() - began,
    }
    rows = []
    for name in steps:
        ms = harness.quartiles(values[name]["ms"])
        faster = harness.ratios(values[name]["ms"], values[OURS]["ms"])
        could_be = harness.ratios(values[name]["ms"], values[PRODUCTS]["ms"])
        results[name] = {
            "ms": ms,
            "tokens_per_s": 1e3 * num_tokens / ms[1],
            "nsphere_is_faster_by": faster,
            "over_products": could_be,
        }
        rate = f"{1e3 * num_tokens / ms[1]:,.0f}"
        rows.append([name, harness.spread(ms, 0), rate, harness.spread(faster), harness.spread(could_be)])
    header = ["implementation", "ms a step", "tokens/s", "nsphere is faster by", "products alone would be by"]
    harness.finish(f"nGPT step, {args.size}, {ours.dtype_name}", header, rows, results, args.json)
    for label, reason in left_out.items():
        print(f"{label}: {reason}")
