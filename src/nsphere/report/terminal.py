"""What `nsphere compare` and `nsphere inspect` print."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nsphere.report.curves import is_finite
from nsphere.report.verdict import answer
from nsphere.table import printable, text_table


def comparison_table(summary: Mapping[str, Any], out: Path) -> str:
    """What `nsphere compare` prints: the arms, the answer, a sample of each, and where the report is."""
    rows = []
    for name, arm in summary["arms"].items():
        spread = arm["final_val_loss_spread"]
        rows.append(
            [
                name,
                _number(arm["final_val_loss"], ".4f") + ("" if spread is None else f" ±{spread / 2:.4f}"),
                _number(arm["bits_per_byte"], ".4f"),
                _number(arm["best_lr"], "g"),
                f"{arm['tokens']:,}",
                _number(arm["step_time_ms_median"], ",.1f"),
                _number(arm["tokens_per_second"], ",.0f"),
                "–" if arm["peak_memory_bytes"] is None else f"{arm['peak_memory_bytes'] / 2**20:,.0f}",
                f"{arm['num_parameters']:,}",
            ]
        )
    header = ["arm", "val loss", "bits/byte", "lr", "tokens", "step ms", "tokens/s", "peak MiB", "parameters"]
    sentence, remarks = answer(summary)
    parts = [text_table(header, rows), "", sentence, *remarks]
    for name, arm in summary["arms"].items():
        if "sample" in arm:
            parts += ["", f"--- a sample of {name} ---", printable(arm["sample_prompt"] + arm["sample"])]
    return "\n".join([*parts, "", f"report: {out / 'report.html'}"])


def inspection_table(inspection: Mapping[str, Any]) -> str:
    """A line per layer of what `nsphere inspect` draws."""
    layers = inspection["layers"]
    matrices = list(layers[0]["condition_numbers"])
    means = [k for k in ("eigen_lr_attention", "eigen_lr_mlp", "s_qk", "s_u", "s_v") if k in layers[0]]
    header = ["layer", *(f"cond {m}" for m in matrices), "max logit", *(f"mean {k}" for k in means)]
    rows = [
        [
            str(i),
            *(_number(layer["condition_numbers"][m], ".3g") for m in matrices),
            _number(layer["max_attention_logit"], ".3g"),
            *(_number(layer[k]["mean"], ".3f") for k in means),
        ]
        for i, layer in enumerate(layers)
    ]
    lines = [text_table(header, rows)]
    if inspection["s_z"] is not None:
        lines.append(f"s_z: mean {inspection['s_z']['mean']:.3f}")
    if inspection["max_norm_deviation"] is not None:
        lines.append(f"largest deviation of a row from unit norm: {inspection['max_norm_deviation']:.2g}")
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return format(value, form) if is_finite(value) else "–"
