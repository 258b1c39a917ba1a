"""Progress on the terminal, of a training stage and of counted work: a live line where someone watches, plain lines in
a log.

Without rich, and on a dumb terminal, plain lines everywhere.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

from nanochat import optional
from nanochat.streams import live

T = TypeVar("T")


class Progress:
    """Shows step, loss, tokens per second, MFU where the peak is known, and the time that is left."""

    def __init__(self, name: str, total: int, done: int, shown: bool):
        self.name, self.total, self.shown = name, total, shown
        self.every = max(1, total // 20)  # plain lines: about twenty
        self.bar = live_bar() if shown and live() else None
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task(name, total=total, completed=done, text="starting")

    def update(self, step: int, loss: float, rate: float, mfu: float | None, said: str = "") -> None:
        """After each step: smoothed loss in nats, tokens per second, MFU as a fraction or None; or what is said."""
        if not self.shown:
            return
        text = said or f"loss {loss:.4f}  {rate:,.0f} tok/s" + (f"  MFU {mfu:.1%}" if mfu else "")
        if self.bar:
            self.bar.update(self.task, completed=step, text=text)
        elif step % self.every == 0 or step in (1, self.total):
            self.note(f"{self.name} {step:>{len(str(self.total))}}/{self.total}  {text}")

    def note(self, line: str) -> None:
        """A line that stays."""
        if self.bar:
            self.bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        elif self.shown:
            with suppress(OSError):  # nobody reads it any more: no reason to stop training
                print(line, flush=True)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()


class Count:
    """Work that comes in items, as questions: how many are done, how many a second, and the time that is left."""

    EVERY = 15.0  # seconds between plain lines

    def __init__(self, name: str, total: int, shown: bool):
        self.name, self.total, self.done, self.shown = name, total, 0, shown
        self.began = self.said = time.monotonic()
        self.bar = live_bar(transient=True) if shown and live() else None

    def __enter__(self) -> "Count":
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task(self.name, total=self.total, text="")
        return self

    def __exit__(self, *problem: object) -> None:
        if self.bar:
            self.bar.stop()

    def tick(self, more: int) -> None:
        self.done += more
        now = time.monotonic()
        rate = self.done / max(now - self.began, 1e-9)
        if self.bar:
            self.bar.update(self.task, completed=self.done, text=f"{rate:.1f}/s")
        elif self.shown and now - self.said >= self.EVERY and 0 < self.done < self.total:
            self.said = now
            left = (self.total - self.done) / rate
            with suppress(OSError):
                print(f"{self.name} {self.done:,}/{self.total:,}  {rate:.1f}/s  {left:,.0f} s left", flush=True)

    def through(self, items: Iterable[T], size: Callable[[T], int]) -> Iterator[T]:
        """The items, each counted with its size when the next one is asked for."""
        for item in items:
            yield item
            self.tick(size(item))


def live_bar(transient: bool = False) -> Any:
    """rich's progress bar, not yet started; None where there is no rich. transient: it is gone at the end."""
    try:
        progress = optional.package("rich.progress", "Progress")
    except ImportError:
        return None
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=20),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[text]}"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
        speed_estimate_period=60,
        transient=transient,
    )
