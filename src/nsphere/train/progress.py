"""What a person sees of long work: a bar with an ETA on a terminal, plain lines elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

console = Console(stderr=True, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """90 → 1:30, 4000 → 1:06:40."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class StepProgress:
    """Progress over the steps of a run: `with StepProgress("ngpt", 600, every=30) as p: p.update(step, text)`.

    Args:
        title: what is being done.
        total: steps in all.
        every: steps between lines where the output is no terminal.
        start: steps done before.
    """

    def __init__(self, title: str, total: int, every: int, start: int = 0) -> None:
        self.title, self.total, self.every, self.start = title, total, max(1, every), start
        self._bar: Progress | None = None

    def __enter__(self) -> "StepProgress":
        self._began, self._first = time.perf_counter(), self.start
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
                console=console,
            )
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.start, text="")
            self._bar.start()
        return self

    def update(self, step: int, text: str) -> None:
        """Show that `step` steps are done; `text` says how it goes."""
        if step == self.start + 1:  # the first step compiles: it says nothing about the rest
            self._began, self._first = time.perf_counter(), step
        done = step - self._first
        left = (time.perf_counter() - self._began) / done * (self.total - step) if done else None
        eta = "ETA –" if left is None else f"ETA {duration(left)}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=f"{text}  {eta}")
        elif step % self.every == 0 or step == self.total:
            console.print(f"{self.title}: step {step}/{self.total}  {text}  {eta}", markup=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def say(text: str) -> None:
    """One plain line to the person watching."""
    console.print(text, markup=False)
