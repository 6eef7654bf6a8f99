"""`make gpu OUT=folder`: the tests that need a GPU, then every benchmark, in at most nine minutes on one GPU.

Needs no more than Python, torch and numpy, with the source on PYTHONPATH: what a stage lacks besides, it is skipped
for, with the reason. The tests run first, side by side with what fills the compiler's cache; whatever is timed runs
alone. A stage that fails, or has no time left, does not keep the others from running.

    PYTHONPATH=src python3 benchmarks/gpu.py --out results/gpu [--minutes 9] [--only step] [--tiny]

--tiny is the same run at sizes and on a device that any machine has, to try the script itself.
"""

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "src"))


class Stage(NamedTuple):
    """A benchmark: `module.main(module.Args(**arguments))` in a process of its own."""

    name: str
    module: str
    arguments: dict[str, Any]
    tiny: dict[str, Any]
    """The arguments of a trial."""
    limit_s: int = 90
    backend: str | None = None
    """NSPHERE_BACKEND."""
    warm: bool = False
    """Whether a run of one round before fills the compiler's cache."""


ARMS = ("gpt", "gpt-qknorm", "ngpt")
TINY_STEP = {"sizes": ("tiny",), "modes": ("compiled",), "rounds": 1}


def _step(size: str, backend: str) -> Stage:
    arguments = {"sizes": (size,), "modes": ("compiled",), "rounds": 11, "arms": ARMS}
    return Stage(f"step-{size}-{backend}", "nsphere.bench.step", arguments, TINY_STEP, backend=backend, warm=True)


TOKENS = (64, 1024, 8192, 131072)
TINY_OPS: dict[str, Any] = {"tokens": (8,), "head_dims": (16,), "num_heads": 4, "widths": (32,), "rounds": 1}

# in the order of importance: what there is no time for is at the end
STAGES = (
    Stage(
        "ops-qk_norm_rope",
        "nsphere.bench.ops",
        {"ops": ("qk_norm_rope",), "tokens": TOKENS},
        {"ops": ("qk_norm_rope",), **TINY_OPS},
        limit_s=120,
        warm=True,
    ),
    Stage(
        "ops-normalized_update",
        "nsphere.bench.ops",
        {"ops": ("normalized_update",), "tokens": TOKENS},
        {"ops": ("normalized_update",), **TINY_OPS},
        limit_s=120,
        warm=True,
    ),
    Stage("optimizer", "nsphere.bench.optimizer", {"size": "0.5b-1k"}, {"size": "tiny", "rounds": 1}, limit_s=60),
    _step("0.5b-1k", "compiled"),
    _step("0.5b-1k", "triton"),
    _step("0.5b-4k", "compiled"),
    _step("0.5b-4k", "triton"),
    _step("0.5b-8k", "compiled"),
    _step("0.5b-8k", "triton"),
    Stage("memory", "nsphere.bench.memory", {"size": "0.5b-4k"}, {"size": "tiny"}),
    Stage(
        "decode",
        "nsphere.bench.decode",
        {"size": "0.5b-1k", "dtype": "bfloat16"},
        {"size": "tiny", "prompt_tokens": 4, "new_tokens": 2, "rounds": 1},
    ),
    Stage("qk", "qk", {"device": "cuda", "rounds": 15}, {"rounds": 1}),
)


def why_skip(stage: Stage) -> str | None:
    """The reason this stage can't run here, None if it can."""
    import torch

    from nsphere.ops.backend import why_not

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return None if stage.backend is None else why_not(stage.backend, device)


def run_stage(stage: Stage, tiny: bool, path: Path | None, rounds: int | None = None) -> None:
    """In this process."""
    from nsphere.bench.step import SIZES, Size
    from nsphere.train.config import TrainConfig

    shape = {"d_model": 32, "num_layers": 1, "num_heads": 2, "context": 16, "batch_size": 2}
    SIZES["tiny"] = Size(TrainConfig(preset="demo", **shape), 64)  # type: ignore[arg-type]
    module = importlib.import_module(stage.module)
    arguments = dict(stage.tiny if tiny else stage.arguments)
    if rounds is not None:
        arguments["rounds"] = rounds
    module.main(module.Args(**arguments, json=path))


class Outcome(NamedTuple):
    """What became of a stage."""

    state: str
    """ran, failed, out of time, or skipped with the reason."""
    seconds: float
    output: str
    results: Any = None


def environment(stage: Stage | None = None) -> dict[str, str]:
    """The variables of a process that runs a stage, or the tests."""
    variables = {**os.environ, "PYTHONUNBUFFERED": "1"}
    path = [str(HERE.parent / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables["PYTHONPATH"] = os.pathsep.join(path)
    if stage is not None and stage.backend is not None:
        variables["NSPHERE_BACKEND"] = stage.backend
    return variables


class Process:
    """A command with a time limit, its output kept in a file."""

    def __init__(self, command: Sequence[str], variables: dict[str, str], log: Path) -> None:
        self.began, self.log = time.monotonic(), log
        with log.open("w") as output:
            self.process = subprocess.Popen(command, env=variables, stdout=output, stderr=subprocess.STDOUT)

    def wait(self, seconds: float) -> Outcome:
        """Until it ends, or for so long."""
        try:
            code = self.process.wait(max(seconds, 0.1))
            state = "ran" if code == 0 else f"failed (exit code {code})"
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            state = "out of time"
        return Outcome(state, time.monotonic() - self.began, self.log.read_text(errors="replace"))


def start(stage: Stage, tiny: bool, folder: Path, warming: bool = False) -> Process:
    """The stage in a process of its own."""
    path = folder / f"{stage.name}.json"
    command = [sys.executable, str(HERE / "gpu.py"), "--stage", stage.name, "--out", str(folder)]
    command += ["--tiny"] * tiny + ["--warm"] * warming
    return Process(command, environment(stage), path.with_suffix(".warm" if warming else ".log"))


def start_tests(folder: Path) -> Process:
    """The tests marked gpu."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--rootdir", str(HERE.parent)]
    return Process([*command, "tests/ops/on_device"], environment(), folder / "tests.log")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json and log.txt")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument("--only", nargs="+", help="the stages whose name has one of these in it; `tests` is one")
    parser.add_argument("--tiny", action="store_true", help="the same at tiny sizes, on whatever there is")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        [stage] = [s for s in STAGES if s.name == args.stage]
        run_stage(stage, args.tiny, None if args.warm else args.out / f"{stage.name}.json", 1 if args.warm else None)
        return 0

    import tempfile

    import torch

    end = time.monotonic() + 60 * args.minutes - 10
    if not torch.cuda.is_available() and not args.tiny:
        parser.error("no CUDA device here; --tiny tries this script without one")
    args.out.mkdir(parents=True, exist_ok=True)
    os.chdir(HERE.parent)
    chosen = [s for s in STAGES if args.only is None or any(part in s.name for part in args.only)]
    outcomes: dict[str, Outcome] = {}

    def report(name: str, outcome: Outcome) -> None:
        outcomes[name] = outcome
        print(f"\n===== {name}: {outcome.state}, {outcome.seconds:.0f} s", flush=True)
        print(outcome.output if outcome.state == "ran" else outcome.output[-4000:], flush=True)
        write(args.out, outcomes)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tests = None
        if args.only is None or "tests" in args.only:
            missing = [name for name in ("pytest", "pytest_timeout") if importlib.util.find_spec(name) is None]
            if missing:
                report("tests", Outcome(f"skipped: {', '.join(missing)} not installed", 0.0, ""))
            else:
                tests = start_tests(folder)
        reasons = {stage.name: why_skip(stage) for stage in chosen}
        runnable = [s for s in chosen if reasons[s.name] is None]
        warming = [start(s, args.tiny, folder, warming=True) for s in runnable if s.warm and not args.tiny]
        beside = min(end, time.monotonic() + 60 * args.minutes / 3)
        if tests is not None:
            report("tests", tests.wait(beside - time.monotonic()))
        for process in warming:
            outcome = process.wait(beside - time.monotonic())
            if outcome.state.startswith("failed"):  # its stage will say why
                print(f"{process.log.name}: {outcome.state}", flush=True)
        for stage in chosen:
            left = end - time.monotonic()
            if reasons[stage.name] is not None:
                report(stage.name, Outcome(f"skipped: {reasons[stage.name]}", 0.0, ""))
            elif left < 5:
                report(stage.name, Outcome("skipped: no time left", 0.0, ""))
            else:
                outcome = start(stage, args.tiny, folder).wait(min(left, stage.limit_s))
                path = folder / f"{stage.name}.json"
                report(stage.name, outcome._replace(results=json.loads(path.read_text()) if path.exists() else None))
    print(f"\n{summary(outcomes)}")
    return 0 if all(o.state == "ran" or o.state.startswith("skipped") for o in outcomes.values()) else 1


def summary(outcomes: dict[str, Outcome]) -> str:
    """A line for each stage."""
    return "\n".join(f"{name:24} {o.seconds:4.0f} s  {o.state}" for name, o in outcomes.items())


def write(out: Path, outcomes: dict[str, Outcome]) -> None:
    """results.json and log.txt, after every stage: a run that is cut off leaves what it has."""
    record = {name: {"state": o.state, "seconds": o.seconds, "results": o.results} for name, o in outcomes.items()}
    (out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    logs = [f"===== {name}: {o.state}\n{o.output}" for name, o in outcomes.items()]
    (out / "log.txt").write_text("\n\n".join([summary(outcomes), *logs]) + "\n")


if __name__ == "__main__":
    sys.exit(main())
