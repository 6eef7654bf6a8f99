"""A model's tensors under canonical names: what a checkpoint calls them, and whether saved ones fit."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from nsphere.collectives import local


class Mismatch(NamedTuple):
    """Names that a restore passed over: in the model only, and in the checkpoint only."""

    missing: list[str]
    unexpected: list[str]


class LiveTensor(NamedTuple):
    """A tensor of the model and its name in the unwrapped model's state_dict."""

    raw_name: str
    tensor: Tensor


def canonical_name(name: str) -> str:
    """A parameter's name without what compiling or checkpointing the modules on its way put into it.

    >>> canonical_name("blocks.0._orig_mod.attn.weight")
    'blocks.0.attn.weight'
    """
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "_checkpoint_wrapped_module"))


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and (Distributed)DataParallel's wrappers."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def live_tensors(model: nn.Module) -> dict[str, LiveTensor]:
    """Parameters and persistent buffers by canonical name; tied ones are there under every name.

    Raises:
        ValueError: two names become one, or the state_dict holds something that is no tensor.
    """
    live: dict[str, LiveTensor] = {}
    for raw_name, tensor in unwrapped(model).state_dict(keep_vars=True).items():
        name = canonical_name(raw_name)
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}; a checkpoint holds tensors (drop get_extra_state)")
        if name in live:
            raise ValueError(f"{live[name].raw_name} and {raw_name} both become {name}; rename one of the modules")
        live[name] = LiveTensor(raw_name, tensor)
    return live


def tied_names(live: dict[str, LiveTensor]) -> dict[str, str]:
    """Each name that stands for the same memory as an earlier name -> that earlier name."""
    first: dict[Any, str] = {}
    tied = {}
    for name, (_, tensor) in live.items():
        address = local(tensor.detach()).data_ptr()  # 0 for an empty one, which shares nothing
        memory = tensor.device, address, tensor.shape, tensor.stride(), tensor.dtype
        owner = first.setdefault(memory if address else id(tensor), name)
        if owner != name:
            tied[name] = owner
    return tied


def parameter_names(model: nn.Module) -> dict[int, str]:
    """id(parameter) -> canonical name, the first where it is tied."""
    return {id(p): canonical_name(name) for name, p in unwrapped(model).named_parameters()}


def some(names: Sequence[str]) -> str:
    """The first three, and how many more: for messages of one line."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_fit(
    live: dict[str, LiveTensor], saved: dict[str, Tensor], strict: bool, same_bits: Callable[[str, str], bool]
) -> Mismatch:
    """Whether saved tensors can be copied into the model's as they are.

    Args:
        live: the model's.
        saved: canonical name -> tensor, of which shape and dtype count; tied ones are the same object.
        strict: names must be the same on both sides; shapes, dtypes and ties must always agree.
        same_bits: whether two saved tensors, by name, are equal; a NaN equals itself.

    Returns:
        The names on one side only.

    Raises:
        ValueError: with the first mismatches, in one line.
    """
    tied = tied_names(live)
    present = {tied.get(name, name) for name in live if name in saved}
    missing = [name for name in live if tied.get(name, name) not in present]
    unexpected = [name for name in saved if name not in live]
    wrong = []
    for name, (_, tensor) in live.items():
        if name not in saved:
            continue
        own, owner = saved[name], tied.get(name, name)
        if (own.shape, own.dtype) != (tensor.shape, tensor.dtype):
            wrong.append(f"{name} is {_kind(own)} in the checkpoint and {_kind(tensor)} in the model")
        elif tensor.is_meta:
            wrong.append(f"{name} has no memory in the model (call to_empty first)")
        elif saved.get(owner, own) is not own and (_kind(saved[owner]) != _kind(own) or not same_bits(name, owner)):
            wrong.append(f"{name} and {tied[name]} are one tensor in the model and two in the checkpoint")
    faults = [some(wrong)] if wrong else []
    if strict and missing:
        faults.append(f"the checkpoint lacks {some(missing)}")
    if strict and unexpected:
        faults.append(f"the model lacks {some(unexpected)}")
    if faults:
        raise ValueError("; ".join(faults))
    return Mismatch(missing, unexpected)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
