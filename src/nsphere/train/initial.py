"""The initial weights of a model that is spread over ranks: those of one process, bit for bit, and never whole.

Each rank draws the whole model's numbers, one matrix after the other, from the seed, in the order in which one process
does, and keeps its part of each. So the most that it holds is its own share and one matrix.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nsphere.gpt import Embedding
from nsphere.hypersphere import SphereEmbedding, SphereLinear
from nsphere.layers import Decoder, DecoderConfig
from nsphere.ops.normalize_matrices import normalize_matrices_
from nsphere.presets import make_model
from nsphere.train.model_state import canonical_name

_WITH_MATRIX = (nn.Linear, Embedding, SphereLinear, SphereEmbedding)
"""Modules whose matrices are left out at first. All else is small, and made as it is."""


@contextmanager
def matrices_left_out() -> Iterator[list[Tensor]]:
    """Models made within have matrices without memory (on meta); the list has them in the order of their making."""
    register = nn.Module.register_parameter
    made: list[Tensor] = []

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.dim() > 1 and isinstance(module, _WITH_MATRIX):
            parameter = nn.Parameter(parameter.to("meta"))
            made.append(parameter)
        register(module, name, parameter)

    nn.Module.register_parameter = without_memory  # type: ignore[method-assign, assignment]
    try:
        yield made
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class _Fills(TorchDispatchMode):
    """What fills a matrix without memory fills one with memory instead, which is handed on.

    Args:
        matrices: those made so far; any other is left as it is.
        done: takes a matrix's number and the numbers it was filled with.
    """

    def __init__(self, matrices: Sequence[Tensor] = (), done: Callable[[int, Tensor], None] | None = None) -> None:
        super().__init__()
        self.matrices, self.done = matrices, done

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fills = func in (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default)
        if not (fills and args[0].is_meta):
            return func(*args, **(kwargs or {}))
        number = next((i for i, matrix in enumerate(self.matrices) if matrix is args[0]), None)
        if number is not None and self.done is not None:
            filled = torch.empty(args[0].shape, dtype=args[0].dtype)
            func(filled, *args[1:], **(kwargs or {}))
            self.done(number, filled)
        return args[0]  # torch takes longer to fill nothing than all else that makes a small model


def make_spread(config: DecoderConfig, seed: int, device: torch.device, spread: Callable[[Decoder], None]) -> Decoder:
    """A model that is spread over ranks from its start, with the numbers that `make_model` gives one process.

    Args:
        config: the model's.
        seed: of its numbers.
        device: of this rank.
        spread: makes of a model, whose matrices have no memory yet, what this rank holds of it, in place.
    """
    with torch.random.fork_rng(devices=[]), matrices_left_out() as left_out, _Fills():
        model = make_model(config)
    numbers = {id(matrix): number for number, matrix in enumerate(left_out)}
    names = {numbers[id(p)]: name for name, p in model.named_parameters() if id(p) in numbers}
    spread(model)
    model.to_empty(device=device)
    fill_from_seed(model, names, seed)
    return model


@torch.no_grad()
def fill_from_seed(model: Decoder, names: dict[int, str], seed: int) -> None:
    """Give a model that has memory the values of a fresh one of one process.

    Args:
        model: spread over ranks, on its device, with any numbers.
        names: number among what `matrices_left_out` left out -> the name in the model.
        seed: of the numbers.
    """
    live = {canonical_name(name): tensor for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    dims = {
        canonical_name(f"{path}.{name}"): dim
        for path, module in model.named_modules()
        for name, dim in getattr(module, "sphere_dims", {}).items()
    }

    def keep(number: int, whole: Tensor) -> None:
        name = names[number]
        if name in dims:
            normalize_matrices_([(whole, dims[name])], backend="reference")
        _copy(whole, live[name])

    with torch.random.fork_rng(devices=[]), matrices_left_out() as matrices, _Fills(matrices, keep):
        torch.manual_seed(seed)
        small = make_model(model.config)
    for name, tensor in [*small.named_parameters(), *small.named_buffers()]:
        if not tensor.is_meta:
            _copy(tensor, live[name])


def _copy(whole: Tensor, into: Any) -> None:
    """A whole tensor into what a rank holds of it."""
    if not hasattr(into, "device_mesh"):
        into.copy_(whole)
        return
    own = distribute_tensor(whole.detach(), into.device_mesh, into.placements, src_data_rank=None)
    into.to_local().copy_(own.to_local())
