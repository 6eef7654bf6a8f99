"""`add_qk_norm(model)`: QK-norm in a transformers model that has none, saved and loaded with it."""

import copy
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nsphere.hf.fuse import attentions, check_model, run_once
from nsphere.hf.rewire import CannotRewireError, Wiring, layout_of, own_rope, restore, rewire, wiring_of
from nsphere.norms import StatisticNorm, norm_names
from nsphere.qk_norm import Layout, QKNorm, Tables
from nsphere.rope import RopeSpec

_OWN_NORM = re.compile(r"^(q|k|qk|query|key)_?(\w*_)?(layer_?)?norm$")
_CONFIG_FIELD = "nsphere_qk_norm"
_READ_FROM_THE_MODEL = {"q", "k", "head_dim", "num_heads", "num_kv_heads", "rope", "layout"}


class _Added(Wiring):
    """The wiring of `add_qk_norm`; `scaling` is the attention's own softmax scale, where it was replaced."""

    scaling: float | None = None


class _Recorder(Wiring):
    """Lets the attention do what it always did, and looks at q and k meanwhile."""

    def __init__(self, attention: nn.Module, layout: Layout, place: str):
        self.attention, self.layout, self.place = attention, layout, place
        self.first: tuple[Tensor, Tensor, Tables | Tensor | None] | None = None
        self.plain: QKNorm | None = None
        """With it, mean squares are taken: of q and k, and of what it makes of them."""
        self.squares: list[Tensor] = []

    def __call__(self, q: Tensor, k: Tensor, tables: Tables | Tensor | None) -> Tables:
        turned = (q, k) if tables is None else own_rope(self.attention, q, k, tables)
        if self.first is None:
            self.first = (q, k, tables) if self.layout == "thd" else (q[:1], k[:1], _first_sequence(tables))
        if self.plain is not None:
            given = turned if self.place == "after" else (q, k)
            self._measure(self.plain, [x.float() for x in given])
        return turned

    def _measure(self, plain: QKNorm, given: list[Tensor]) -> None:
        pairs = zip(given, plain(*given), strict=True)
        found = [torch.stack([plain._to_bshd(x, "").double().square().sum((0, 1)) for x in pair]) for pair in pairs]
        self.squares = [a + b for a, b in zip(self.squares, found, strict=True)] if self.squares else found


def _first_sequence(tables: Tables | Tensor | None) -> Tables | Tensor | None:
    if tables is None:
        return None
    if isinstance(tables, Tensor):
        return tables[:1] if tables.dim() == 3 else tables
    cos, sin = (t[:1] if t.dim() == 3 else t for t in tables)
    return cos, sin


def add_qk_norm(
    model: nn.Module,
    norm: str = "rms",
    *,
    place: Literal["before", "after"] = "before",
    calibrate: Mapping[str, Any] | Iterable[Mapping[str, Any]] | None = None,
    softmax_scale: float | None = None,
    freeze: bool = False,
    **options: Any,
) -> list[str]:
    """Put QK-norm into every attention of a transformers model that has none (Llama, Mistral, Qwen 2, Phi, ...).

    Each attention gets a `q_norm` and a `k_norm`, named as in published models, and runs norm and RoPE as one op; see
    `fuse` for how. `model.config` says what was added, so that `save_pretrained` and `nsphere.hf.load` keep it.

    The start. A norm takes away how long each q and k is, and the logits with it. With `calibrate` the weights give the
    scale back: with q̂ the normalised q before its weight, for each head h and dim d

        γ[h, d] = √( mean q[h, d]² / mean q̂[h, d]² )    over the tokens of the calibration,

    and k likewise, so that every dim keeps its mean square; a weight that heads or dims share takes its means over
    them too. What is lost is how much single tokens differ in length. Without `calibrate` weights start at 1.

    Args:
        model: a transformers model, changed in place.
        norm: the name of a registered norm: "rms", "l2", "layer", or your own (nsphere.register_norm).
        place: the norm "before" or "after" RoPE.
        calibrate: keywords of one call of the model, {"input_ids": ...}, or several such; without padding. They run
            without gradients, in evaluation mode.
        softmax_scale: the attentions' own stays by default, but √D comes with unit norms ("l2" without calibration,
            see QKNorm).
        freeze: let the new weights alone be trained; model.requires_grad_(True) thaws the others.
        **options: those of QKNorm and of the norm that a config can hold: eps, weight, over, bias, zero_centered,
            multiplier (a number).
            weight is "per_head" by default for the built-in norms: heads differ in scale. weight="shared" is what
            published models have.

    Returns:
        The names of the attentions that now have QK-norm.

    Raises:
        ValueError: for a norm that is not registered or an option that cannot be saved; a model that has QK-norm; an
            attention of an unknown shape or RoPE, or that the example does not reach; calibration of a norm without
            weight. The model is then as it was.
    """
    check_model("add_qk_norm", model)
    description = _description(norm, place, options)
    if softmax_scale is not None and not (_is_number(softmax_scale) and 0 < softmax_scale < math.inf):
        raise ValueError(f"add_qk_norm got softmax_scale={softmax_scale!r}; give a positive number, or leave it out")
    if not isinstance(freeze, bool):
        raise ValueError(f"add_qk_norm got freeze={freeze!r}; give True or False")
    batches = _batches(calibrate)
    found = _find(model)
    recorders = {name: _Recorder(a, layout_of(type(a), ()), place) for name, a in found.items()}
    try:
        for name, attention in found.items():
            rewire(attention, (), recorders[name])
        run_once(model, batches[0], "calibrate")
        shapes = {name: _shape(name, recorder) for name, recorder in recorders.items()}
        weights: dict[str, list[Tensor]] = {}
        if calibrate is not None:
            for name, recorder in recorders.items():
                recorder.plain = _plain(recorder, shapes[name], description)
            for batch in batches:
                run_once(model, batch, "calibrate")
            weights = {name: _weights(recorder, shapes[name].head_dim) for name, recorder in recorders.items()}
    finally:
        for attention in found.values():
            if wiring_of(attention) is not None:
                restore(attention)
    description["attentions"] = _grouped(shapes)
    if softmax_scale is not None or calibrate is not None:
        description["softmax_scale"] = softmax_scale or "own"
    own = list(model.parameters())
    _install(model, description)
    for parameter in own if freeze else ():
        parameter.requires_grad_(False)
    for name, (q_weight, k_weight) in weights.items():
        normed: Any = found[name]
        with torch.no_grad():
            normed.q_norm.weight.copy_(q_weight)
            normed.k_norm.weight.copy_(k_weight)
    config: Any = getattr(model, "config", None)
    if config is not None:
        setattr(config, _CONFIG_FIELD, description)
    return list(found)


def remove_qk_norm(model: nn.Module) -> list[str]:
    """Undo `add_qk_norm`: the model is what it was before, but for what was trained since. Returns the names."""
    check_model("remove_qk_norm", model)
    names = []
    for name, module in model.named_modules():
        wiring = wiring_of(module)
        if isinstance(wiring, _Added):
            restore(module)
            del module.q_norm, module.k_norm
            if wiring.scaling is not None:
                module.scaling = wiring.scaling
            names.append(name)
    config = getattr(model, "config", None)
    if hasattr(config, _CONFIG_FIELD):
        delattr(config, _CONFIG_FIELD)
    return names


def load(path: Any, cls: Any = None, **from_pretrained: Any) -> Any:
    """A model with the QK-norm that `add_qk_norm` put in, as `save_pretrained` left it.

    Args:
        path: a folder or a name on the hub, as for from_pretrained.
        cls: the model's class; by default the one it was saved as.
        **from_pretrained: its other arguments: dtype, device_map, and so on.

    Raises:
        ValueError: for a model that was saved without (use from_pretrained for that), for what is missing or not whole,
            and for weights without those of the norms.
    """
    import transformers

    config = from_pretrained.pop("config", None) or _loaded(path, transformers.AutoConfig.from_pretrained)
    description = getattr(config, _CONFIG_FIELD, None)
    if description is None:
        raise ValueError(
            f"{path} was saved without add_qk_norm: its config has no {_CONFIG_FIELD}; use from_pretrained"
        )
    parts = ("norm", "place", "options", "attentions")
    if not isinstance(description, Mapping) or not all(part in description for part in parts):
        raise ValueError(f"{path} is not whole: {_CONFIG_FIELD} in its config.json must hold {', '.join(parts)}")
    named = (config.architectures or ["no architecture"])[0]
    if cls is None and (cls := getattr(transformers, named, None)) is None:
        raise ValueError(f"{path} is of {named}, which is no class of transformers; give cls=, the model's class")

    def with_norms(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        _install(self, description)

    made: Any = type(cls.__name__, (cls,), {"__init__": with_norms, "__module__": cls.__module__})
    told = from_pretrained.pop("output_loading_info", False)
    model, loading = _loaded(path, made.from_pretrained, config=config, output_loading_info=True, **from_pretrained)
    model.__class__ = cls
    norms = {f"{name}.{side}_norm." for name, a in model.named_modules() if wiring_of(a) for side in "qk"}
    if lost := sorted(key for key in loading["missing_keys"] if any(key.startswith(norm) for norm in norms)):
        raise ValueError(f"{path} is not whole: its weights lack {', '.join(lost[:3])}; save the model again")
    return (model, loading) if told else model


def _loaded(path: Any, from_pretrained: Callable[..., Any], **options: Any) -> Any:
    """What from_pretrained makes of a path, with what it finds wrong in one sentence."""
    try:
        return from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        what = path if Path(path).is_dir() else f"there is no folder {path}, and as a name on the hub it"
        raise ValueError(f"{what} can't be loaded: {reason}") from error


def _batches(calibrate: Any) -> list[Any]:
    """The calls of the model to be made; one, without inputs of the user's, where there is nothing to calibrate."""
    if calibrate is None or isinstance(calibrate, Mapping):
        return [calibrate]
    batches = list(calibrate) if isinstance(calibrate, Iterable) and not isinstance(calibrate, Tensor) else [calibrate]
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"calibrate got {type(batch).__name__}; give keywords of one call of the model, as "
                '{"input_ids": ...}, or several such'
            )
    if not batches:
        raise ValueError("calibrate holds no batch; give keywords of one call of the model, or several such")
    return batches


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _description(norm: Any, place: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What the config will say; refuses what it cannot."""
    if norm not in norm_names():
        raise ValueError(
            f"add_qk_norm got norm={norm!r}; give the name of a registered norm ({', '.join(norm_names())}), so that "
            "the model can be saved; nsphere.register_norm names one of your own"
        )
    if place not in ("before", "after"):
        raise ValueError(f'place is "before" or "after"; got {place!r}')
    options = dict(options)
    read = sorted(_READ_FROM_THE_MODEL & options.keys())
    if read:
        raise ValueError(f"add_qk_norm got {', '.join(read)}, which it reads from the model; leave that out")
    if norm in ("rms", "l2", "layer") and "over" not in options:
        options.setdefault("weight", "per_head")
    try:
        if json.loads(json.dumps(options)) != options:
            raise TypeError
    except TypeError:
        raise ValueError(
            f"add_qk_norm got {options}; give numbers, strings and truth values, which a config can hold"
        ) from None
    return {"norm": norm, "place": place, "options": options}


def _find(model: nn.Module) -> dict[str, nn.Module]:
    """The attentions QK-norm goes into; ValueError if one speaks against it."""
    found: dict[str, nn.Module] = {}
    for name, module in attentions(model):
        kind = type(module).__name__
        own = [n for n, child in module.named_children() if _OWN_NORM.match(n) and not isinstance(child, nn.Identity)]
        if wiring_of(module) is not None or own or hasattr(module, "qk_norm"):
            raise ValueError(
                f"{name} ({kind}) has QK-norm already{': ' + ', '.join(own) if own else ''}; "
                "nsphere.hf.fuse makes it one op with RoPE, remove_qk_norm takes out what add_qk_norm put in"
            )
        if "forward" in vars(module):
            raise ValueError(f"the forward of {name} ({kind}) has been replaced; add QK-norm before that")
        for parameter in module.parameters():
            if type(parameter) not in (nn.Parameter, Tensor):
                raise ValueError(
                    f"{name} ({kind}) has parameters that are sharded or quantized ({type(parameter).__name__}); add "
                    "QK-norm before that"
                )
            if parameter.is_meta:
                raise ValueError(f"{name} ({kind}) has weights on the meta device; load them first")
        try:
            layout_of(type(module), ())
        except CannotRewireError as reason:
            raise ValueError(f"QK-norm cannot be added to {name} ({kind}): {reason}") from None
        found[name] = module
    if not found:
        raise ValueError(f"{type(model).__name__} holds no attention of transformers")
    return found


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What a QKNorm of one attention is built from, beside the norm."""

    head_dim: int
    num_heads: int
    num_kv_heads: int
    layout: Layout
    rope: RopeSpec | None

    def to_json(self) -> dict[str, Any]:
        rope = self.rope
        turns = None if rope is None else {n: getattr(rope, n) for n in ("dim", "layout", "twice", "sign")}
        return {**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, "rope": turns}

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> "_Shape":
        known = {f.name: fields[f.name] for f in dataclasses.fields(_Shape)}
        return _Shape(**{**known, "rope": None if known["rope"] is None else RopeSpec(**known["rope"])})

    def qk_norm(self, description: Mapping[str, Any], *, rope: bool, **changes: Any) -> QKNorm:
        return QKNorm(
            description["norm"],
            head_dim=self.head_dim,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            layout=self.layout,
            rope=self.rope if rope else None,
            place=description["place"],
            **{**description["options"], **changes},
        )


def _shape(name: str, recorder: _Recorder) -> _Shape:
    if recorder.first is None:
        raise ValueError(f"the example does not reach {name}; give calibrate= inputs that reach all attentions")
    (q, k, tables), layout = recorder.first, recorder.layout
    heads = {"bhsd": 1, "bshd": 2, "thd": 1}[layout]
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"{name} has q of {q.shape[-1]} dims per head and k of {k.shape[-1]}")
    rope = None if tables is None else _rope_spec(recorder.attention, q, k, tables, layout)
    return _Shape(q.shape[-1], q.shape[heads], k.shape[heads], layout, rope)


def _rope_spec(attention: nn.Module, q: Tensor, k: Tensor, tables: Tables | Tensor, layout: Layout) -> RopeSpec:
    """The rotation that the attention's own RoPE function does, found by trying it."""
    if isinstance(tables, Tensor):
        wide: Any = tables
        cos, sin = tables.real, tables.imag
    else:
        cos, sin = wide = tuple(t.float() for t in tables)
    q, k = q.float(), k.float()
    expected = own_rope(attention, q, k, wide)
    head_dim, width = q.shape[-1], cos.shape[-1]
    for dim in (width, 2 * width):
        for sign in (1, -1):
            for pairs, twice in (("half", None), ("interleaved", None), ("interleaved", "halves"), ("half", "pairs")):
                if dim > head_dim or dim % 2:
                    continue
                spec = RopeSpec(dim, layout=pairs, twice=twice, sign=sign)  # type: ignore[arg-type]
                got = QKNorm(None, head_dim=head_dim, rope=spec, layout=layout)(q, k, rope=(cos, sin))
                if all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(got, expected, strict=True)):
                    return spec
    raise ValueError(f"the RoPE of {type(attention).__name__} turns q and k in a way this version does not know")


def _plain(recorder: _Recorder, shape: _Shape, description: Mapping[str, Any]) -> QKNorm:
    """The norms alone, with weights of 1."""
    assert recorder.first is not None
    plain = shape.qk_norm(description, rope=False, softmax_scale="rsqrt").to(recorder.first[0].device)
    for norm in (plain.q_norm, plain.k_norm):
        if not isinstance(norm, StatisticNorm) or norm.weight is None:
            raise ValueError(f"calibrate sets the weights of a built-in norm, and {norm} has none; leave it out")
    if plain.over not in ("head", "full"):
        raise ValueError(f"calibrate can set the weights of norms over a head or all heads; got over={plain.over!r}")
    return plain


def _weights(recorder: _Recorder, head_dim: int) -> list[Tensor]:
    """The weights that keep the mean squares of q and k; see `add_qk_norm`."""
    made = []
    assert recorder.plain is not None
    for squares, norm in zip(recorder.squares, (recorder.plain.q_norm, recorder.plain.k_norm), strict=True):
        assert isinstance(norm, StatisticNorm) and norm.weight is not None
        kind = norm.spec.weight
        if kind == "shared" and norm.dim == head_dim:
            squares = squares.sum(1)  # of [2, H, D]: before the norm, and after
        elif kind in ("scalar_per_head", "scalar"):
            squares = squares.sum(2 if kind == "scalar_per_head" else (1, 2))
        weight = (squares[0] / squares[1].clamp_min(torch.finfo(torch.float64).tiny)).sqrt().reshape(norm.weight.shape)
        made.append(weight - 1 if norm.spec.zero_centered else weight)
    return made


def _grouped(shapes: Mapping[str, _Shape]) -> list[dict[str, Any]]:
    groups: dict[_Shape, list[str]] = {}
    for name, shape in shapes.items():
        groups.setdefault(shape, []).append(name)
    return [{"names": names, **shape.to_json()} for shape, names in groups.items()]


def _install(model: nn.Module, description: Mapping[str, Any]) -> None:
    """Give every attention of the description its norms and its wiring; all of them, or at an error none."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    inside = {name for name, _ in model.named_modules()}
    made: list[tuple[Any, _Added, float | None]] = []
    for group in description["attentions"]:
        shape = _Shape.from_json(group)
        for name in group["names"]:
            attention = model.get_submodule(name if name in inside else name.removeprefix(prefix))
            made.append((attention, *_make(attention, shape, description)))
    for attention, wiring, scale in made:
        if scale is not None:
            wiring.scaling, attention.scaling = attention.scaling, scale
        rewire(attention, (), wiring)
        attention.q_norm, attention.k_norm = wiring.qk_norm.q_norm, wiring.qk_norm.k_norm


def _make(attention: nn.Module, shape: _Shape, description: Mapping[str, Any]) -> tuple[_Added, float | None]:
    """The wiring of one attention, and its softmax scale where it gets another."""
    asked = description.get("softmax_scale")
    with_rope = shape.qk_norm(description, rope=True, softmax_scale="rsqrt" if asked else None)
    like = next(attention.parameters())
    with_rope.to(device=like.device, dtype=like.dtype)
    without = copy.copy(with_rope)  # of the same norms and multipliers, for calls that do not turn
    without.rope = None
    norm = with_rope.q_norm
    unit = isinstance(norm, StatisticNorm) and norm.spec.statistic == "l2" and with_rope.over == "head"
    scale = asked if isinstance(asked, int | float) else with_rope.softmax_scale if asked is None and unit else None
    if scale is not None and not isinstance(getattr(attention, "scaling", None), int | float):
        raise ValueError(f"{type(attention).__name__} has no softmax scale that can be set; leave softmax_scale")
    return _Added(with_rope, without), scale
