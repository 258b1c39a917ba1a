"""What scripts.base_eval prints of CORE, line by line and as a table, and the CSV file that nanochat writes too."""

import csv
import io
import time
from collections.abc import Sequence
from typing import Any

from nanochat.evaluate.bundle import Bundle
from nanochat.evaluate.core import Step
from nanochat.progress import live_bar
from nanochat.streams import live

EVERY = 20.0  # seconds between two lines about a task that is not over, where nobody watches a live one


class Shown:
    """Tells people about progress: call it with every Step."""

    def __init__(self, shown: bool):
        self.shown = shown
        self.said = self.began = time.monotonic()
        self.bar = live_bar() if shown and live() else None
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task("CORE", total=None, text="")

    def begin(self, bundle: Bundle, max_per_task: int, controls: Sequence[str]) -> None:
        if self.shown:
            rows = f"{max_per_task} rows of each" if max_per_task > 0 else "all their rows (--max-per-task asks fewer)"
            again = f", and all again {len(controls)} times: {', '.join(controls)}" if controls else ""
            self._line(f"CORE: {len(bundle.tasks)} tasks, {rows}{again}")

    def __call__(self, step: Step) -> None:
        if not self.shown:
            return
        where = f"CORE {step.number:>{len(str(step.of))}}/{step.of}  {step.label}"
        if step.result is not None:
            rate = step.result.get("n", 0) / max(time.monotonic() - self.began, 1e-9)
            self._line(f"{where:55}{_said(step.result)}, {rate:6.1f} rows/s  ({_left(step.left)})")
            self.began = time.monotonic()
            return
        text = f"{step.done} of {step.rows} rows  ({_left(step.left)})"
        if self.bar:
            self.bar.update(self.task, description=where, completed=step.done, total=step.rows, text=text)
        elif time.monotonic() - self.said > EVERY:
            self._line(f"{where:55}{text}")

    def _line(self, line: str) -> None:
        self.said = time.monotonic()
        if self.bar:
            self.bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, flush=True)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()


def _left(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min left" if seconds > 90 else f"about {seconds:.0f} s left"


def _said(result: dict[str, Any]) -> str:
    if why := result.get("failed"):
        return f"failed: {why}"
    return f"accuracy {result['accuracy']:6.1%}, centered {result['centered']:+.4f}"


def table(found: dict[str, Any]) -> str:
    """All tasks with intervals, the controls beside them, and what is missing."""
    controls = found["controls"]
    head = f"{'task':34} {'n':>6} {'accuracy':>9} {'95% interval':>16} {'guessing':>9} {'centered':>9} {'cropped':>8}"
    lines = [head + "".join(f" {name:>9}" for name in controls)]
    for label, one in found["tasks"].items():
        interval = f"{one['low']:.1%} to {one['high']:.1%}"
        line = f"{label:34} {one['n']:>6} {one['accuracy']:>9.1%} {interval:>16} {one['baseline']:>9.1%}"
        line += f" {one['centered']:>+9.4f} {one['cropped'] or '–':>8}"
        lines.append(
            line + "".join(f" {accuracies.get(label, float('nan')):>9.1%}" for accuracies in controls.values())
        )
    name = "partial CORE" if found["partial"] else "CORE"
    lines.append(f"{name} {found['core']:.4f} (95% interval {found['low']:.4f} to {found['high']:.4f})")
    if found["missing"]:
        lines.append(f"It is over {len(found['tasks'])} tasks, and not comparable with one over all; missing: "
                     f"{', '.join(found['missing'])}")  # fmt: skip
    lines += [f"failed: {label}: {why}" for label, why in found["failed"].items()]
    if found["max_per_task"] > 0:
        lines.append(
            f"Of each task {found['max_per_task']} rows were asked, at most: the intervals say what that is worth."
        )
    return "\n".join(lines)


def as_csv(found: dict[str, Any]) -> bytes:
    """Task, accuracy, centered accuracy; CORE in the last row."""
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(("Task", "Accuracy", "Centered"))
    for label, one in found["tasks"].items():
        rows.writerow((label, f"{one['accuracy']:.6f}", f"{one['centered']:.6f}"))
    rows.writerow(("CORE (partial)" if found["partial"] else "CORE", "", f"{found['core']:.6f}"))
    return text.getvalue().encode()
