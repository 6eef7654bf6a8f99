"""Leaving cleanly: a signal asks the loop to save and stop after the step it is in."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = [s for name in ("SIGINT", "SIGTERM", "SIGUSR1") if (s := getattr(signal, name, None)) is not None]


class Interrupted(Exception):
    """A run was asked to stop, saved, and can be resumed. `exit_code` is 128 + the signal's number, as in a shell."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class StopRequest:
    """`with StopRequest() as stop: ... if stop.signal is not None: save and leave`.

    SIGINT (Ctrl-C), SIGTERM and SIGUSR1 (a cluster's warning) are noted rather than obeyed; a second Ctrl-C interrupts
    at once. Outside the main thread signals can't be caught, and nothing changes. Nested requests share the outermost.
    """

    _active: "StopRequest | None" = None

    def __init__(self) -> None:
        self._received: int | None = None
        self._previous: dict[int, Any] = {}

    @property
    def signal(self) -> int | None:
        """The signal that asked to stop, or None."""
        outer = StopRequest._active
        return outer._received if outer is not None else self._received

    @classmethod
    def received(cls) -> int | None:
        """The signal that the request in force has received, if any."""
        return cls._active._received if cls._active is not None else None

    def __enter__(self) -> "StopRequest":
        if StopRequest._active is None and threading.current_thread() is threading.main_thread():
            StopRequest._active = self
            self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if StopRequest._active is self:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            StopRequest._active = None
