"""Jobs of several ranks on this machine, joined by gloo: forked from this process, which has torch loaded already."""

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Job:
    """`work(rank)` in `size` processes, as torchrun would start them; their output goes to `log`."""

    def __init__(self, size: int, work: Callable[[int], object], log: Path) -> None:
        port, self.log = free_port(), log
        self.codes: dict[int, int] = {}
        self.pids = [self._start(rank, size, port, work) for rank in range(size)]

    def _start(self, rank: int, size: int, port: int, work: Callable[[int], object]) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(output, stream)
            sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            if size > 1:
                ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
                os.environ |= {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"}
            result = work(rank)
            code = result if isinstance(result, int) else 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def kill(self, rank: int, number: int = 9) -> None:
        if rank not in self.codes:
            os.kill(self.pids[rank], number)

    def poll(self) -> bool:
        """Whether all ranks have ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def wait(self, limit: float = 400.0) -> list[int]:
        """The exit codes, by rank. What has not ended by then is killed, and an error."""
        end = time.monotonic() + limit
        while not self.poll():
            if time.monotonic() > end:
                for rank in range(len(self.pids)):
                    self.kill(rank)
                raise AssertionError(f"ranks hang after {limit} s; {self.codes}\n{self.output()[-4000:]}")
            time.sleep(0.005)
        return [self.codes[rank] for rank in range(len(self.pids))]

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""
