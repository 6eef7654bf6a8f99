"""Tables for the terminal."""

from collections.abc import Sequence


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
