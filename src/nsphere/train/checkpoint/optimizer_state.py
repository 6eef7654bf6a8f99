"""The state of one or several optimizers by parameter name, so that no index or order has to be the same again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nsphere.train.model_state import parameter_names, some

# How a group's arithmetic is carried out is the resuming machine's choice, not the saving one's.
_MACHINE_OPTIONS = frozenset({"params", "param_names", "foreach", "fused", "capturable", "differentiable"})


def _kind(optimizer: Optimizer) -> str:
    """The class whose state this is: its own, unless it says that it shares another's."""
    return getattr(optimizer, "saved_as", type(optimizer).__name__)


def as_list(optimizers: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
    """One, several or no optimizers as a list."""
    if optimizers is None:
        return []
    return [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)


def collect(model: nn.Module, optimizers: list[Optimizer]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """What there is to save.

    Returns:
        The tensors as "state.<parameter name>.<key>", and for each optimizer, for JSON, its "class", its "groups"
        ("params": names, "options") and its "numbers" (state that is not tensors, by parameter name).

    Raises:
        ValueError: an optimizer holds a parameter that the model does not have, shares one with another optimizer,
            or keeps something that is neither a tensor nor fit for JSON.
    """
    names = parameter_names(model)
    tensors: dict[str, Tensor] = {}
    contents = []
    for optimizer in optimizers:
        kind = _kind(optimizer)
        groups = [
            {
                "params": group_names,
                "options": {k: _plain(v, f"{kind}'s {k}") for k, v in group.items() if k not in _MACHINE_OPTIONS},
            }
            for group, group_names in zip(optimizer.param_groups, _group_names(optimizer, names), strict=True)
        ]
        numbers: dict[str, dict[str, Any]] = {}
        for parameter, state in optimizer.state.items():
            name = names.get(id(parameter))
            if name is None:
                raise ValueError(f"{kind} keeps state for something that is not one of the model's parameters")
            for key, value in state.items():
                if "." in key or f"state.{name}.{key}" in tensors:
                    raise ValueError(f"{kind}'s state {key!r} of {name} has a dot in its name, or is there twice")
                if isinstance(value, Tensor):
                    tensors[f"state.{name}.{key}"] = value
                else:
                    numbers.setdefault(name, {})[key] = _plain(value, f"{kind}'s state {key!r} of {name}")
        contents.append({"class": kind, "groups": groups, "numbers": numbers})
    return tensors, contents


def _group_names(optimizer: Optimizer, names: dict[int, str]) -> list[list[str]]:
    """The canonical names of each group's parameters."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise ValueError(
                    f"{type(optimizer).__name__} holds a parameter of shape {list(parameter.shape)} that the model "
                    "does not have; build the optimizer from this model's parameters"
                )
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def _plain(value: Any, what: str) -> Any:
    """The value as JSON can hold it: a number, a string, None, or a list of them. 0-d tensors become numbers."""
    if isinstance(value, Tensor) and value.dim() == 0:
        return value.item()
    if isinstance(value, list | tuple):
        return [_plain(entry, what) for entry in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{what} is a {type(value).__name__}; a checkpoint holds tensors, numbers and strings")


class Stored(NamedTuple):
    """A tensor of the state where it is stored: under which name, and its shape and dtype (on the meta device)."""

    name: str
    like: Tensor


@dataclass(frozen=True)
class GroupPlan:
    """What to put into one live group: the saved options, and for each parameter its saved numbers and `Stored`."""

    optimizer: Optimizer
    group: dict[str, Any]
    options: dict[str, Any]
    states: list[dict[str, Any]]


def plan(
    model: nn.Module,
    optimizers: list[Optimizer],
    tensors: dict[str, Tensor],
    contents: list[dict[str, Any]],
    tied: dict[str, str],
) -> list[GroupPlan]:
    """Find the saved group of every live one, by its parameters' names, and change nothing.

    Args:
        model: whose parameters the optimizers hold.
        optimizers: with the saved classes and groups, in any order.
        tensors: as `collect` gave them; of which shapes and dtypes count.
        contents: as `collect` gave them.
        tied: each tied name of the saved model -> the name its parameter was saved under.

    Raises:
        ValueError: a group has no counterpart on the other side, or is of another class.
    """
    names = parameter_names(model)
    saved_groups = {
        frozenset(group["params"]): (content["class"], group["options"])
        for content in contents
        for group in content["groups"]
    }
    states: dict[str, dict[str, Any]] = {}
    for flat_name, tensor in tensors.items():
        name, _, key = flat_name.removeprefix("state.").rpartition(".")
        states.setdefault(name, {})[key] = Stored(flat_name, tensor)
    for content in contents:
        for name, numbers in content["numbers"].items():
            states.setdefault(name, {}).update(numbers)

    plans = []
    for optimizer in optimizers:
        kind = _kind(optimizer)
        for group, group_names in zip(optimizer.param_groups, _group_names(optimizer, names), strict=True):
            saved_names = [tied.get(name, name) for name in group_names]
            saved_kind, options = saved_groups.pop(frozenset(saved_names), (None, {}))
            if saved_kind != kind:
                was = f"was saved from {saved_kind}" if saved_kind else "is not a group in the checkpoint"
                raise ValueError(
                    f"{kind}'s group of {some(group_names)} {was}; build the optimizers as in the saved run"
                )
            plans.append(GroupPlan(optimizer, group, options, [states.get(name, {}) for name in saved_names]))
    for group_names_left, (kind, _) in saved_groups.items():
        raise ValueError(
            f"no optimizer was given for {kind}'s group of {some(sorted(group_names_left))}; "
            "build the optimizers as in the saved run"
        )
    return plans


def carry_out(plans: list[GroupPlan]) -> dict[str, Tensor]:
    """Give every group the saved options and state, except how it computes (fused, foreach, capturable).

    Returns:
        The state's tensors by the name they are stored under, for the caller to fill.
    """
    targets: dict[str, Tensor] = {}
    for planned in plans:
        group = planned.group
        for key, value in planned.options.items():
            group[key] = _like(group.get(key), value)
        # torch keeps step counters on the CPU unless the kernel reads them
        # (Optimizer._process_value_according_to_param_policy)
        counters_on_cpu = not (group.get("fused") or group.get("capturable"))
        for parameter, saved in zip(group["params"], planned.states, strict=True):
            before = planned.optimizer.state.pop(parameter, {})
            state = {}
            for key, value in saved.items():
                if isinstance(value, Stored):
                    device = torch.device("cpu") if key == "step" and counters_on_cpu else parameter.device
                    state[key] = targets[value.name] = _target(before.get(key), value.like, parameter, device)
                else:
                    state[key] = value
            if state:
                planned.optimizer.state[parameter] = state
    return targets


def _like(live: Any, saved: Any) -> Any:
    """A saved option as the live one is: a tensor is filled in place, a list becomes a tuple where it has one."""
    if isinstance(live, Tensor):
        return live.fill_(saved)
    if isinstance(live, tuple) and len(live) == len(saved):
        return tuple(_like(old, new) for old, new in zip(live, saved, strict=True))
    return saved


def _target(live: Any, saved: Tensor, parameter: Tensor, device: torch.device) -> Tensor:
    """The live tensor if the saved one fits it, else a new one with the parameter's memory layout and sharding."""
    if isinstance(live, Tensor) and (live.shape, live.dtype, live.device) == (saved.shape, saved.dtype, device):
        return live
    if saved.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=saved.dtype, device=device, requires_grad=False)
    return torch.empty(saved.shape, dtype=saved.dtype, device=device)
