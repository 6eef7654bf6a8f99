"""`fuse(model)`: norm and RoPE of q and k as one op in the attentions of a transformers model; `unfuse(model)`."""

import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nsphere import families
from nsphere.hf.qk_norm import family_of, qk_norm
from nsphere.hf.rewire import Wiring, layout_of, restore, rewire, wiring_of
from nsphere.norms import StatisticNorm
from nsphere.qk_norm import Layout

# How far an attention's output may move, in roundings of its largest value. Rounded as the family rounds, q and k are
# the same bit for bit, but lie otherwise in memory, which some kernels show in the last bits.
_ROUNDINGS = {"family": 8.0, "fused": 64.0}


@dataclasses.dataclass(frozen=True)
class FuseReport:
    """What `fuse` did. Printed, it reads as a table."""

    rounding: str
    """As it was asked for."""
    replaced: Mapping[str, str]
    """The attentions that were fused, by their name in the model, and what they are."""
    left: Mapping[str, str]
    """The attentions that were left as they are, and why."""

    def __str__(self) -> str:
        lines = [f'norm and RoPE are one op (rounding="{self.rounding}") in {len(self.replaced)} attention(s):']
        lines += _grouped(self.replaced)
        if self.left:
            lines += [f"left as they are, {len(self.left)}:", *_grouped(self.left)]
        return "\n".join(lines)


class _Borrowed(StatisticNorm):
    """A norm of ours that reads weight and bias from the model's own norm at every use.

    So whatever is done to the model, moved, loaded, sharded, its parameters stay the only ones.
    """

    def __init__(self, ours: StatisticNorm, theirs: nn.Module):
        nn.Module.__init__(self)
        self.spec, self.dim, self.num_heads = ours.spec, ours.dim, ours.num_heads
        self.__dict__["_theirs"] = theirs  # no submodule

    @property
    def weight(self) -> Tensor | None:  # type: ignore[override]
        return self._read("weight")

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        return self._read("bias") if self.spec.bias else None

    def _read(self, name: str) -> Tensor | None:
        theirs: Any = self.__dict__["_theirs"]
        per_head = getattr(theirs, "norms", None)
        if isinstance(per_head, nn.ModuleList):
            return torch.stack([getattr(norm, name) for norm in per_head])
        return getattr(theirs, name, None)


def fuse(
    model: nn.Module,
    *,
    rounding: Literal["fused", "family"] = "fused",
    inputs: Mapping[str, Any] | None = None,
) -> FuseReport:
    """Run norm and RoPE of q and k as one op wherever a transformers model has QK-norm.

    The model is changed in place; parameters, names in the state dict, caches, masks, kernels and everything else stay
    its own. Each attention is checked before it is kept: its output on `inputs` with our op, rounded as the family
    rounds, must be what it was. What cannot be shown to be the same is left as it is.

    Args:
        model: a transformers model, or any module that holds its attentions.
        rounding: "fused", fp32 throughout with one rounding at the end: faster, and nearer to the exact value than the
            model's own code; or "family", the model's own rounding points, bit for bit, at the speed of its own code:
            for checking what else changed.
        inputs: keywords for one call of the model, which the check runs (without gradients, in evaluation mode). By
            default eight token ids; give some that reach the other attentions of a model of several modalities.

    Returns:
        What was replaced, and what was left and why. Fusing again starts afresh: the last rounding counts.

    Raises:
        ValueError: if the model has no attention with QK-norm, if none can be fused, if the inputs do not run, and
            for weights on the meta device.
    """
    check_model("fuse", model)
    if rounding not in ("fused", "family"):
        raise ValueError(f'rounding is "fused" or "family"; got {rounding!r}')
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("the model has weights on the meta device; load them before fusing")
    unfuse(model)
    found, left = _candidates(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has nothing to fuse: {_why_nothing(left)}")
    calls = record_calls(model, list(found), inputs)
    replaced: dict[str, str] = {}
    for name, attention in found.items():
        try:
            replaced[name] = _fuse_one(attention, rounding, calls.get(attention))
        except ValueError as reason:
            left[name] = str(reason)
    report = FuseReport(rounding, replaced, left)
    if not replaced:
        raise ValueError(f"nothing in {type(model).__name__} could be fused:\n" + "\n".join(_grouped(left)))
    return report


def unfuse(model: nn.Module) -> list[str]:
    """Undo `fuse`, and return the names of the attentions that were fused: each runs its own code again."""
    check_model("unfuse", model)
    names = []
    for name, module in model.named_modules():
        wiring = wiring_of(module)
        if isinstance(wiring, _Fused):
            restore(module)
            names.append(name)
    return names


class _Fused(Wiring):
    """The wiring of `fuse`."""


@dataclasses.dataclass
class Call:
    """One call of an attention: what it was given and what it returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def record_calls(model: nn.Module, names: list[str], inputs: Mapping[str, Any] | None) -> dict[nn.Module, Call]:
    """The first call of each of these modules while the model runs once on the inputs.

    Raises:
        ValueError: if it does not run.
    """
    calls: dict[nn.Module, Call] = {}
    modules = [model.get_submodule(name) for name in names]

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.setdefault(module, Call(args, kwargs, output))

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in modules]
    try:
        run_once(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def check_model(owner: str, model: Any) -> None:
    """Raise ValueError for what is no module."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"{owner} takes a transformers model, got {type(model).__name__}")


def run_once(model: nn.Module, inputs: Mapping[str, Any] | None, argument: str = "inputs") -> None:
    """Call the model on the inputs, or on eight token ids: no gradients, evaluation mode, no cache.

    Args:
        model: what to call.
        inputs: keywords of the call.
        argument: what the user gives them as.

    Raises:
        ValueError: if it does not run.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            model(**_without_cache(model) | (_token_ids(model) if inputs is None else dict(inputs)))
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        which = "example token ids" if inputs is None else "the inputs given"
        raise ValueError(
            f"{type(model).__name__} did not run on {which} ({type(error).__name__}: {error}); give "
            f"{argument}={{...}}, the keywords of one call that works"
        ) from error
    finally:
        for module in training:
            module.training = True


def attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module that calls itself an attention, by name, without the parts of one."""
    for name, module in model.named_modules():
        if re.search(r"Attention|MLA", type(module).__name__):
            yield name, module


def _candidates(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The attentions with a QK-norm, and the others with what speaks against them."""
    found, left = {}, {}
    for name, module in attentions(model):
        if wiring_of(module) is not None:
            left[name] = "its QK-norm came by add_qk_norm and is one op with RoPE already"
            continue
        try:
            family = families.get(family_of(module))
        except ValueError:
            left[name] = f"{type(module).__name__} has no QK-norm that nsphere knows"
            continue
        try:
            qk_norm(module, multiplier=None)
        except ValueError as error:
            left[name] = str(error)
            continue
        if family.q is None or family.k is None:
            left[name] = f"{type(module).__name__} ({family.name}) has no norm of both q and k per token"
        else:
            found[name] = module
    return found, left


def _why_nothing(left: Mapping[str, str]) -> str:
    if not left:
        return "it holds no attention of transformers"
    ((reason, _),) = collections.Counter(left.values()).most_common(1)
    advice = " (nsphere.hf.add_qk_norm puts QK-norm into a model that has none)"
    return reason if "add_qk_norm" in reason else reason + advice


def _fuse_one(attention: nn.Module, rounding: str, call: Call | None) -> str:
    """Fuse one attention, check it, and say what it is; ValueError with the reason leaves it as it was."""
    family = families.get(family_of(attention))
    norms = tuple(dict.fromkeys(family.attributes))
    why_not = _why_not(attention, norms)
    if why_not:
        raise ValueError(why_not)
    if call is None:
        raise ValueError("the example inputs do not reach it; give inputs= that do")
    layout = layout_of(type(attention), norms)
    for check in dict.fromkeys(("family", rounding)):
        rewire(attention, norms, _wiring(attention, layout, check))
        try:
            with torch.no_grad():
                output = _run(attention, call)
        except Exception as error:  # whatever it is, the attention is left as it was
            restore(attention)
            raise ValueError(f"the check failed: {type(error).__name__}: {error}") from error
        difference = _difference(output, call.output)
        if not difference <= _ROUNDINGS[check]:
            restore(attention)
            raise ValueError(f"the check failed: its output changed by {difference:.3g} roundings ({check} rounding)")
        if check != rounding:
            restore(attention)
    statistic = {"rms": "RMS", "layer": "LayerNorm", "l2": "L2"}[family.q.statistic]  # type: ignore[union-attr]
    width = "all heads" if family.over == "full" else "each head"
    return f"{type(attention).__name__}: {family.name}, {statistic} over {width} {family.place} RoPE"


def _wiring(attention: nn.Module, layout: Layout, rounding: str) -> Wiring:
    # multipliers and the softmax scale stay where they are, in the attention's own code
    options: dict[str, Any] = {"rounding": rounding, "multiplier": None, "softmax_scale": "rsqrt", "layout": layout}
    family = families.get(family_of(attention))
    with_rope = qk_norm(attention, rope=family.rope is not None, **options)
    made = [with_rope, qk_norm(attention, rope=False, **options)]
    for qk in made:
        for side, attribute in zip(("q_norm", "k_norm"), family.attributes, strict=True):
            ours = getattr(qk, side)
            if isinstance(ours, StatisticNorm) and ours.weight is not None:
                setattr(qk, side, _Borrowed(ours, getattr(attention, attribute)))
    return _Fused(*made)


def _why_not(attention: nn.Module, norms: tuple[str, ...]) -> str | None:
    if "forward" in vars(attention):
        return "its forward has been replaced (by accelerate's hooks, say); fuse before that"
    for name in norms:
        norm: Any = getattr(attention, name, None)
        if norm is None:
            return f"it has no {name}"
        parts = list(norm.modules())
        if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in parts):
            return f"its {name} has hooks, which would not be called any more"
        if any(type(p) not in (nn.Parameter, Tensor) for p in norm.parameters()):
            return f"the parameters of its {name} are of a subclass of Tensor (sharded, or quantized)"
    return None


def _run(attention: nn.Module, call: Call) -> Any:
    was = attention.training
    attention.training = False
    try:
        return attention(*call.args, **call.kwargs)
    finally:
        attention.training = was


def _difference(output: Any, before: Any) -> float:
    """The largest difference, in roundings of the largest value."""
    ours, theirs = (o[0] if isinstance(o, tuple) else o for o in (output, before))
    unit = torch.finfo(theirs.dtype).eps * theirs.abs().max().item()
    if not bool(torch.isfinite(theirs).all()):
        return float("inf")
    return ((ours - theirs).abs().max().item()) / unit if unit else float((ours != theirs).any())


def _token_ids(model: nn.Module) -> dict[str, Tensor]:
    parameter = next(model.parameters())
    config: Any = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    vocabulary = getattr(config, "vocab_size", None) or 1
    # not 8 tokens: there torch 2.13's own flex attention gives garbage on a CPU with AVX2 alone
    return {"input_ids": torch.arange(12, device=parameter.device).remainder(vocabulary)[None]}


def _without_cache(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    return {"use_cache": False} if hasattr(model, "prepare_inputs_for_generation") and config is not None else {}


def _grouped(names: Mapping[str, str]) -> list[str]:
    """Names that differ in a number alone, on one line with what they share."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, text in names.items():
        groups.setdefault((re.sub(r"\d+", "*", name), text), []).append(name)
    lines = []
    for (pattern, text), members in groups.items():
        shown = members[0] if len(members) == 1 else f"{pattern} ({len(members)})"
        lines.append(f"  {shown or 'the module itself'}: {text}")
    return lines


__all__ = ["FuseReport", "fuse", "unfuse"]
