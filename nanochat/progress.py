"""Progress of a training stage on the terminal: a live line where someone watches, plain lines in a log."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """Shows step, loss, tokens per second, MFU where the peak is known, and the time that is left."""

    def __init__(self, name: str, total: int, done: int, shown: bool):
        self.name, self.total, self.shown = name, total, shown
        self.console = Console(highlight=False)
        self.every = max(1, total // 20)  # plain lines: about twenty
        self.bar: RichProgress | None = None
        if shown and self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self.bar = RichProgress(*columns, console=self.console, speed_estimate_period=60)
            self.bar.start()
            self.task = self.bar.add_task(name, total=total, completed=done, text="starting")

    def update(self, step: int, loss: float, rate: float, mfu: float | None) -> None:
        """After each step: smoothed loss in nats, tokens per second, MFU as a fraction or None."""
        if not self.shown:
            return
        text = f"loss {loss:.4f}  {rate:,.0f} tok/s" + (f"  MFU {mfu:.1%}" if mfu else "")
        if self.bar:
            self.bar.update(self.task, completed=step, text=text)
        elif step % self.every == 0 or step in (1, self.total):
            self.note(f"{self.name} {step:>{len(str(self.total))}}/{self.total}  {text}")

    def note(self, line: str) -> None:
        """A line that stays."""
        if self.shown:
            self.console.print(line, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
