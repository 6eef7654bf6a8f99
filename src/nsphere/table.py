"""Tables for the terminal."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under their headings: the first to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    return "\n".join([line(header), line(["-" * w for w in widths]), *map(line, rows)])


def printable(text: str) -> str:
    """Text that a model made, without the control characters that could command a terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None or not math.isfinite(value) else format(value, form)


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
    parts = [text_table(header, rows), "", _answer(summary)]
    for name, arm in summary["arms"].items():
        if "sample" in arm:
            parts += ["", f"--- a sample of {name} ---", printable(arm["sample_prompt"] + arm["sample"])]
    return "\n".join([*parts, "", f"report: {out / 'report.html'}"])


def _answer(summary: Mapping[str, Any]) -> str:
    from nsphere.verdict import answer

    sentence, remarks = answer(summary)
    return "\n".join([sentence, *remarks])


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


def info_table() -> str:
    """What `nsphere info` prints."""
    import platform

    import torch

    import nsphere
    from nsphere.ops import backend
    from nsphere.train.machine import cpu_name, has_bf16

    rows = [
        ["nsphere", nsphere.__version__],
        ["torch", torch.__version__],
        ["python", platform.python_version()],
        ["cpu", f"{cpu_name()}, {torch.get_num_threads()} threads"],
    ]
    devices = [torch.device("cpu")] + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    if len(devices) == 1:
        rows.append(["gpu", "none" if torch.version.cuda else "none (this torch is built without CUDA)"])
    for device in devices:
        bf16, compiler = has_bf16(device), backend.can_compile(device.type)
        rows.append([f"{device} dtype", f"{'bfloat16' if bf16.available else 'float32'}: {bf16.reason}"])
        rows.append([f"{device} model", f"{'compiled' if compiler.available else 'eager'}: {compiler.reason}"])
        for name in backend.BACKENDS:
            reason = backend.why_not(name, device.type)
            rows.append([f"{device} ops, {name}", "runs" if reason is None else f"does not run: {reason}"])
        asked = backend.asked_by_environment()
        why = "NSPHERE_BACKEND asks for it" if asked else backend.preferred(device.type)[1]
        rows.append([f"{device} ops, chosen", f"{backend.choose(device)}: {why}"])
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)
