"""Jobs of several ranks, killed and hurt; each file in a process of its own, from which ranks can be forked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from nsphere.train.files import read_jsonl

HERE = Path(__file__).parent


def run(*command: object) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs fork")
class TestRanks:
    def test_cases(self) -> None:
        run(
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "-p",
            "no:logging",
            HERE / "cases_of_ranks.py",
        )

    @pytest.mark.parametrize(("ranks", "kills"), [(1, 2), (2, 1)])
    def test_kills(self, ranks: int, kills: int) -> None:
        """A short form of what left kill_loop.log."""
        told = run(HERE / "kill_loop.py", "--kills", kills, "--ranks", ranks, "--seed", 3)
        assert f"kills: {kills}" in told

    def test_torchrun_starts_a_job_again_and_it_resumes_by_itself(self, tmp_path: Path) -> None:
        """One rank is killed in its sixth step; torchrun's second start goes on from a checkpoint to the end."""
        (tmp_path / "killer.py").write_text(KILLER)
        os.environ["KILLED"] = str(tmp_path / "killed")
        data = tiny.text_file(tmp_path).data
        flags = "--steps 10 --d-model 32 --num-layers 2 --num-heads 2 --context 16 --batch-size 4 --micro-batch-size 2"
        flags += " --eval-every 5 --eval-sequences 8 --device cpu --no-compile --checkpoint-every 2 --no-tensorboard"
        torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", 2, "--max-restarts", 1)
        train = ("-m", "nsphere", "train", "--resume", "--import", tmp_path / "killer.py", "--data", data)
        try:
            run(*torchrun, *train, "--out", tmp_path / "run", *flags.split())
        finally:
            del os.environ["KILLED"]
        assert (tmp_path / "killed").exists() and (tmp_path / "run" / "result.json").exists()
        steps = [r["step"] for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
        assert steps == list(range(1, 11))

    def test_a_layout_that_does_not_fit_ends_with_one_line_and_code_2(self, tmp_path: Path) -> None:
        """A mesh that can't be made; nothing is written."""
        data = tiny.text_file(tmp_path).data
        shape = "--d-model 32 --num-layers 1 --num-heads 1 --context 16 --batch-size 4 --steps 1 --device cpu"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        flags = ["compare", "--tp", "3", *shape.split(), "--data", data, "--out", str(tmp_path / "run")]
        job = subprocess.run([*torchrun, "-m", "nsphere", *flags], capture_output=True, text=True, timeout=500)
        told = job.stdout + job.stderr
        assert job.returncode == 1, told  # torchrun's own, whatever its workers say
        bad = "dp_replicate 1 x dp_shard 1 x tp 3 is 3 ranks and torchrun started 2 ranks"
        assert len([line for line in told.splitlines() if "nsphere " in line and bad in line]) == 1, told
        assert "exitcode  : 2 " in told, told
        assert not (tmp_path / "run").exists()


KILLER = """
import os, signal
from pathlib import Path
from nsphere.train.trainer import Trainer

step, killed = Trainer.step, Path(os.environ["KILLED"])

def deadly(self):
    if os.environ["RANK"] == "1" and self.num_steps == 5 and not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self)

Trainer.step = deadly
"""
