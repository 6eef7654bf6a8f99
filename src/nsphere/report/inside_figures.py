"""Pictures of the inside of trained models: eigen learning rates, scales, condition numbers, logits, the sphere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nsphere.report import pictures
from nsphere.report.drawing import arm_styles, clean, power_of_ten
from nsphere.report.html_parts import block, escape, figure, not_available, pair

EIGEN_LR = (("eigen_lr_attention", "α_A, attention"), ("eigen_lr_mlp", "α_M, MLP"))
SCALES = (("s_qk", "s_qk, queries and keys"), ("s_u", "s_u, MLP in"), ("s_v", "s_ν, MLP gate"))
MATRICES = {
    "W_q": "W_q, queries",
    "W_k": "W_k, keys",
    "W_v": "W_v, values",
    "W_o": "W_o, attention output",
    "W_u": "W_u, MLP in",
    "W_nu": "W_ν, MLP gate",
    "W_v_gate": "W_ν, MLP gate",
    "W_down": "W_down, MLP out",
}


def inside_figures(inspections: Mapping[str, Mapping[str, Any] | None]) -> list[str]:
    """The figures of the inside of the models; `inspections`: arm -> its inspection, or None."""
    found = {name: inspection for name, inspection in inspections.items() if inspection}
    if not found:
        return ['<p class="missing">Not available: no model was inspected.</p>']
    layers = {name: inspection.get("layers") or [] for name, inspection in found.items()}
    return [
        _eigen_lr(found, layers),
        _scales(found, layers),
        _condition_numbers(layers),
        pair(_attention_logits(layers), _norm_deviation(found)),
    ]


def _attention_logits(layers: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    lines = {name: [layer.get("max_attention_logit") for layer in own] for name, own in layers.items()}
    return figure(
        "attention-logits",
        "Largest attention logit",
        "Attention that saturates shows as logits that grow with training; QK-norm and the sphere bound them.",
        [pictures.layers_picture("attention-logits", "largest logit, before the softmax", lines)],
        layers,
        missing="attention logits were not measured",
    )


def _eigen_lr(found: Mapping[str, Any], layers: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    styles, whose = arm_styles(found), _whose(layers)
    panels = []
    for i, name in enumerate(found):
        for key, what in EIGEN_LR:
            values = [layer.get(key) for layer in layers[name]]
            panels.append(
                pictures.eigen_lr_picture(f"eigen-lr-{i}-{key}", whose[name] + what, values, styles[name].colour)
            )
    return figure(
        "eigen-lr",
        "Eigen learning rates",
        "How far each layer moves the hidden state towards what its block proposes: 0 is not at all, 1 all the way."
        " Mark: mean over the dimensions; thick: one standard deviation; thin: smallest to largest.",
        panels,
        (),
        missing="only nGPT has eigen learning rates, and no nGPT arm was inspected",
    )


def _scales(found: Mapping[str, Any], layers: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    styles, whose = arm_styles(found), _whose(layers)
    panels = []
    for i, (name, inspection) in enumerate(found.items()):
        distributions = {what: [layer.get(key) for layer in layers[name]] for key, what in (*EIGEN_LR, *SCALES)}
        distributions["s_z, vocabulary"] = [inspection.get("s_z")]
        for k, (what, values) in enumerate(distributions.items()):
            panels.append(pictures.ridges_picture(f"scales-{i}-{k}", whose[name] + what, values, styles[name].colour))
    return figure(
        "scales",
        "Distributions of the learned scales",
        "One histogram per layer, its mean as a tick; a wide one uses its freedom per dimension,"
        " a spike could have been a single number.",
        panels,
        (),
        missing="only nGPT has these scales, and no nGPT arm was inspected",
        small=True,
    )


def _whose(layers: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    """The arm's name for the titles of its panels, needed only where several arms have eigen learning rates."""
    styles = arm_styles(layers)
    several = sum(any(layer.get("eigen_lr_attention") for layer in own) for own in layers.values()) > 1
    return {name: f"{styles[name].title}: " if several else "" for name in layers}


def _norm_deviation(found: Mapping[str, Any]) -> str:
    styles = arm_styles(found)
    items = []
    for name, inspection in found.items():
        deviation = inspection.get("max_norm_deviation")
        if deviation is not None:
            verdict = "within" if deviation <= 1e-6 else "<strong>above</strong>"
            items.append(
                f'<p><span class="big">{power_of_ten(deviation, 2)}</span> {escape(styles[name].title)}: '
                f"{verdict} the limit of 10⁻⁶ that holds after every step.</p>"
            )
    return block(
        "norm-deviation",
        "Distance from the hypersphere",
        "The largest |‖w‖ − 1| over every row or column that belongs on the sphere; rounding to fp32 alone gives"
        " about 10⁻⁷.",
        "".join(items) or not_available("no arm keeps its matrices on the hypersphere, or it was not measured"),
    )


def _condition_numbers(layers: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    every = [layer.get("condition_numbers") or {} for own in layers.values() for layer in own]
    matrices = list(dict.fromkeys(matrix for numbers in every for matrix in numbers))
    values = [v for numbers in every for v in numbers.values() if v is not None and 0 < v < float("inf")]
    panels = []
    for i, matrix in enumerate(matrices):
        lines = {
            name: [(layer.get("condition_numbers") or {}).get(matrix) for layer in own] for name, own in layers.items()
        }
        limits = (min(values) / 1.5, max(values) * 1.5) if values else None
        title = clean(MATRICES.get(matrix, matrix))
        panels.append(pictures.layers_picture(f"condition-{i}", title, lines, True, limits, (230, 190)))
    return figure(
        "condition-numbers",
        "Condition numbers of the matrices",
        "Largest over smallest singular value, by layer: the higher, the closer a matrix is to having lost directions."
        " The scale is logarithmic and the same in every panel.",
        panels,
        layers,
        missing="condition numbers were not measured",
        small=True,
    )
