"""Jobs of several ranks, killed and hurt; each file in a process of its own, from which ranks can be forked."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run(*command: object) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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

    @pytest.mark.parametrize(("ranks", "kills"), [(1, 3), (2, 2)])
    def test_kills(self, ranks: int, kills: int) -> None:
        """A short form of what left kill_loop.log."""
        told = run(HERE / "kill_loop.py", "--kills", kills, "--ranks", ranks, "--seed", 3)
        assert f"kills: {kills}" in told
