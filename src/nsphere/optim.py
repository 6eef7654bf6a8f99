"""Keeping a model on the hypersphere while it is trained: SphereAdamW, or a hook on any torch optimizer."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from nsphere.collectives import local, split_axes
from nsphere.hypersphere import project_what_is_off_, sphere_matrices
from nsphere.ops.normalize_matrices import normalize_matrices_ as project_
from nsphere.ops.sphere_adamw import sphere_adamw_


class SphereAdamW(torch.optim.AdamW):
    """AdamW whose step leaves every sphere matrix of the model on the sphere, in one pass over each weight.

    Equal to `torch.optim.AdamW` followed by the projection, up to the last rounding of the norm, and as fast as
    AdamW alone. Its state has AdamW's names, so that a state_dict moves between the two in both directions.

    Weights in a low precision are stepped through fp32 masters, which are part of the state ("master"); the moments
    are fp32 too. A step that a gradient scaler skips changes nothing, and a weight without a gradient keeps every bit.

    Args:
        model: has SphereLinear, SphereEmbedding or modules marked with `on_sphere`; those of its matrices that are
            off the sphere are projected now.
        params: parameters or parameter groups as for any optimizer; all of the model's if not given.
        lr: learning rate.
        betas: (β₁, β₂), the decay of the two moments.
        eps: added to √v̂.
        weight_decay: decoupled, on every parameter of a group. nGPT has none.
        stochastic_rounding: bf16 weights are rounded up or down at random, right on average, and have no masters,
            which saves 4 bytes a parameter. The same seed gives the same bits again.
        seed: of that rounding.
        backend: of the step, see `nsphere.ops.sphere_adamw`; by default the best that can run.
        **options: AdamW's others, of which none but `fused` may be on.

    Raises:
        ValueError: the model has no sphere matrix, or `params` holds none; an option that this step does not have.

    >>> optimizer = SphereAdamW(model, lr=2e-3)

    Source: arXiv 2410.01131, section 2.6; AdamW: arXiv 1711.05101.
    """

    saved_as = "AdamW"
    """The class a checkpoint names: either can go on from the other's state."""

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        stochastic_rounding: bool = False,
        seed: int = 0,
        backend: str | None = None,
        **options: Any,
    ) -> None:
        _refuse_options(options)
        super().__init__(
            model.parameters() if params is None else params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            fused=True,
        )
        if stochastic_rounding:
            for group in self.param_groups:
                group["rounding_seed"] = seed  # counted up by every step, and saved with the group's options
        self.model, self.backend = model, backend
        _check_held(model, self)
        project_what_is_off_(model)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "model": self.model, "backend": self.backend}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure`, if given, computes the loss again, which is then returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        sphere_dims = {id(m.weight): m.dim for m in sphere_matrices(self.model)}
        split: list[tuple[Tensor, int]] = []
        for group in self.param_groups:
            _refuse_options(group)
            seed = group.get("rounding_seed")
            batches: dict[Any, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    if p.grad.is_sparse:
                        raise ValueError("SphereAdamW got a sparse gradient; build the embedding with sparse=False")
                    batches.setdefault((p.device, torch.promote_types(p.dtype, torch.float32)), []).append(p)
            for (_, wide), params in batches.items():
                states = [self._state_of(p, wide, masters=seed is None) for p in params]
                weights = [s.get("master", p) for s, p in zip(states, params, strict=True)]
                # a copy only of bf16 that is rounded stochastically
                weights = [w if w.dtype == wide else w.to(wide) for w in weights]
                dims = [sphere_dims.get(id(p)) for p in params]
                for i, (p, dim) in enumerate(zip(params, dims, strict=True)):
                    if dim is not None and split_axes(p, dim):
                        split.append((p, dim))
                        dims[i] = None
                sphere_adamw_(
                    [local(w) for w in weights],
                    [local(p.grad) for p in params if p.grad is not None],
                    [local(s["exp_avg"]) for s in states],
                    [local(s["exp_avg_sq"]) for s in states],
                    [local(s["step"]) for s in states],
                    dims,
                    lr=group["lr"],
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    rounded=[None if p.dtype == wide else local(p) for p in params],
                    rounding_seed=seed,
                    grad_scale=getattr(self, "grad_scale", None),
                    found_inf=found_inf,
                    backend=self.backend,
                )
            if seed is not None:
                group["rounding_seed"] = seed + 1
        if split and not (found_inf is not None and found_inf.item()):
            project_(split)
        return loss

    def _state_of(self, p: Tensor, wide: torch.dtype, masters: bool) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p, dtype=wide)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=wide)
        if masters and p.dtype != wide and "master" not in state:
            state["master"] = p.detach().to(wide)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer; moments and masters stay fp32 where the weights are not."""
        super().load_state_dict(state_dict)
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(ids, params, strict=True):
            if p.dtype == torch.promote_types(p.dtype, torch.float32):
                continue
            for key, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, Tensor) and value.dim():  # torch rounds every state to the weight's dtype
                    wide = torch.promote_types(value.dtype, torch.float32)
                    self.state[p][key] = value.to(device=p.device, dtype=wide, copy=True)


def _refuse_options(options: dict[str, Any]) -> None:
    for name in ("amsgrad", "maximize", "capturable", "differentiable", "foreach"):
        if options.get(name):
            raise ValueError(
                f"SphereAdamW has no {name}; leave it out, or use torch.optim.AdamW with keep_on_hypersphere"
            )


def _check_held(model: nn.Module, optimizer: Optimizer) -> None:
    matrices = list(sphere_matrices(model))
    if not matrices:
        raise ValueError("no module of this model says that a matrix belongs on the sphere; mark them with on_sphere")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(m.weight) in held for m in matrices):
        raise ValueError(
            f"this {type(optimizer).__name__} holds none of the model's {len(matrices)} sphere matrices "
            f"(the first is {matrices[0].name}); build it from this model's parameters, after any wrapping"
        )


def keep_on_hypersphere(model: nn.Module, optimizer: Optimizer) -> RemovableHandle:
    """Put the model's matrices on the sphere now, if they are not, and project them after every `optimizer.step()`.

    Works with any torch optimizer, and with several: call it once for each. A step that is skipped (a gradient
    scaler that saw infinities) changes nothing and so projects nothing; between accumulated micro-batches nothing
    happens; a frozen matrix is not touched, not even in its last bits. SphereAdamW does this by itself.

    Args:
        model: has SphereLinear, SphereEmbedding or modules marked with `on_sphere`.
        optimizer: holds at least one of those matrices.

    Returns:
        A handle; `handle.remove()` stops the projection.

    Raises:
        ValueError: the model has no such matrix, or the optimizer holds none of them.

    Source: arXiv 2410.01131, section 2.6, step 2.
    """
    _check_held(model, optimizer)
    project_what_is_off_(model)

    def project_after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # a fused optimizer is stepped by the gradient scaler even where it saw infinities, and skips inside
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and found_inf.item():
            return
        # only what this optimizer just changed: normalising a unit row again would alter its last bits
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        project_([(m.weight, m.dim) for m in sphere_matrices(model) if id(m.weight) in stepped])

    return optimizer.register_step_post_hook(project_after_step)
