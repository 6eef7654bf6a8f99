"""What a step sends: collectives and bytes by kind, seen where torch dispatches them."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {
    "c10d.allreduce_": "all_reduce",
    "c10d._allgather_base_": "all_gather",
    "c10d._reduce_scatter_base_": "reduce_scatter",
    "c10d.alltoall_base_": "all_to_all",
    "_c10d_functional.all_reduce": "all_reduce",
    "_c10d_functional.all_gather_into_tensor": "all_gather",
    "_c10d_functional.reduce_scatter_tensor": "reduce_scatter",
}
"""Both names of each kind: FSDP's, which writes into buffers, and the compiler's."""


class Traffic(TorchDispatchMode):
    """Counts collectives and the bytes of the whole tensor that each is about (a shard times the ranks)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func.name()).replace("::", ".").partition(".")
        kind = KINDS.get(f"{name[0]}.{name[2].partition('.')[0]}")
        if kind is not None:
            tensors = [t for t in torch.utils._pytree.tree_leaves((args, result)) if isinstance(t, Tensor)]
            self.calls[kind] += 1
            # of an all-to-all what this rank gives: the second tensor
            about = tensors[1:2] if kind == "all_to_all" else tensors
            self.bytes[kind] += max(t.numel() * t.element_size() for t in about)
        elif name[0] in ("c10d", "_c10d_functional") and "wait_tensor" not in name[2]:
            raise AssertionError(f"an unknown collective: {func.name()}")
        return result


@contextlib.contextmanager
def counted() -> Iterator[Traffic]:
    with Traffic() as traffic:
        yield traffic
