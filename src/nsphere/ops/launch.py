"""What the Triton kernels share: a launch as data, so that what runs is also what is compiled ahead of time."""

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# programs per multiprocessor where each walks over many rows and keeps sums: enough to hide latency, few partial sums
PROGRAMS_PER_SM = 4


class Launch(NamedTuple):
    """A kernel with everything it is called with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int = 4
    max_registers: int | None = None
    """Of a thread, as an order to the assembler; by default it weighs them against the programs that fit."""

    def options(self) -> dict[str, Any]:
        """What the compiler is told besides the arguments."""
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, "enable_fp_fusion": True} | limit

    def run(self) -> None:
        """Call the kernel, on the device of its tensors."""
        device = next(t.device for t in _tensors(self.arguments.values()))
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.kernel[self.grid](**self.arguments, **self.options())


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """Those among the arguments, and in tuples of them."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from _tensors(argument)


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Of a GPU; elsewhere (the interpreter) 1."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def persistent_programs(num_rows: int, device: torch.device) -> int:
    """How many programs share the rows when each keeps partial sums: fixed by machine and size, so deterministic."""
    return max(1, min(num_rows, PROGRAMS_PER_SM * num_multiprocessors(device)))


def warps_for(num_elements: int, per_thread: int = 8) -> int:
    """Warps for a tile of this many elements, from 1 to 16."""
    return max(1, min(16, num_elements // (32 * per_thread)))


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def refuses_dtype(*tensors: Tensor) -> str | None:
    """Why the kernels do not take one of these, None if they take all."""
    for t in tensors:
        if t.dtype not in KERNEL_DTYPES:
            return f"the kernels compute in fp32 and take bf16, fp16 and fp32, not {t.dtype}"
    return None
