"""`--profile N` of a script: N warm steps are recorded, and the page about them is written; the work goes on.

A `Recorder` is called after each step, of training or of an engine that answers (watch.py). It lets the first
steps pass (compiling, growing caches), lets torch's profiler warm up for one more, records N, and leaves in
<folder>/profile/ the trace, profile.json and profile.html. Rank 0 alone records. Meanwhile the card's sensors are
sampled and garbage collections marked. Nothing that is computed is touched: losses and answers are the same to the
bit. A step is slower while it is recorded: those that pass are timed too, and the page says how much; until it is over,
none is replayed as a CUDA graph. A recording that fails says why and lets the work go on.
"""

import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.hardware import Hardware
from nanochat.trainer import Stage
from profiling.nvml import Sampler
from profiling.recorded import step_page, watch
from profiling.recorded.idle import GC

WARM = 3  # steps that pass unseen


def watcher(steps: int) -> Callable[[Stage], Callable[[], None]] | None:
    """For Setup.watch: None for no steps. Raises UserError for a negative number, and later for too few steps left."""

    def watch_stage(stage: Stage) -> Callable[[], None]:
        recorder = Recorder(watch.training(stage), steps)
        stage.replay = False  # a graph's kernels are known by name only: neither their shapes nor what launched them
        recorder.open.callback(lambda: setattr(stage, "replay", True))
        return recorder.after_step

    return watch_stage if wanted(steps) else None


def engine_recorder(
    engine: Engine, steps: int, name: str, folder: Path, hardware: Hardware, more: str = ""
) -> "Recorder | None":
    """Records the engine's next steps into folder/profile/; None for no steps. Raises UserError for a negative number.

    name: what is done with the engine; more: what makes more steps. Call `end` when no more steps come: only then the
    page is made, which takes seconds, or it is said that there were too few steps.
    """
    if not wanted(steps):
        return None
    recorder = Recorder(watch.decoding(engine, name, folder, hardware, more), steps)
    engine.after_step, engine.part = recorder.after_step, record_function

    def leave() -> None:
        engine.after_step, engine.part = lambda: None, nullcontext

    recorder.open.callback(leave)
    return recorder


def wanted(steps: int) -> bool:
    """Whether there is anything to record. Raises UserError for a negative number."""
    if steps < 0:
        raise UserError(f"--profile is {steps}, wanted how many steps to record, or 0")
    return steps > 0


def check(steps: int, there: int, said: str, more: str) -> None:
    """Raises UserError when there are too few steps; said: whose they are and how many, more: what to do then."""
    if wanted(steps) and there < WARM + 1 + steps:
        raise UserError(f"{_needs(steps)}, and {said}; {more}")


def _needs(steps: int) -> str:
    return f"--profile {steps} needs {WARM + 1 + steps} steps, the first {WARM + 1} to get warm"


class Recorder:
    """See the module. Raises UserError where it is known that too few steps are left."""

    def __init__(self, watched: watch.Watched, steps: int):
        if watched.left is not None:
            check(steps, watched.left, f"{watched.name} has {watched.left} left", watched.more)
        self.watched, self.steps, self.done = watched, steps, 0
        self.path = watched.folder / "profile" / "trace-rank0.json.gz"
        self.sampler = Sampler(watched.hardware.device.index or 0)
        self.open = ExitStack()  # what is undone when the recording ends
        self.beside: list[str] = []  # what is done between the recorded steps: it lies inside their time
        self.ms: dict[str, list[float]] = dict(unrecorded=[], recorded=[])  # of usual steps with nothing beside
        self.began: float | None = None  # when the step that runs did, if nothing was done before it
        self.profiler: profile | None = None
        self.over = False  # it was recorded, or could not be

    def after_step(self) -> None:
        self.done += 1
        if self.over:
            return
        try:
            self._time()
            due = self.watched.due()
            if WARM < self.done <= WARM + self.steps:
                self.beside += due
            self._record()
            self.began = None if due else time.perf_counter()
        except Exception as problem:  # noqa: BLE001  # no recording is worth the result of the work
            self._drop()
            print(f"{self.watched.name}: not recorded: {problem}")

    def _time(self) -> None:
        """Of the step that ended now."""
        if self.done <= WARM + 1 or self.done == WARM + 1 + self.steps:
            self.watched.hardware.synchronize()  # so that the steps recorded, and those before, are whole on the device
        now = time.perf_counter()
        self.watched.note()
        if self.began is not None and self.done != WARM + 1 and self.watched.usual():
            self.ms["unrecorded" if self.done <= WARM else "recorded"].append(1e3 * (now - self.began))

    def _record(self) -> None:
        if self.done == WARM:
            self.profiler = self._start()
        elif self.profiler and self.done < WARM + 1 + self.steps:
            self.profiler.step()
        elif self.profiler:
            self.profiler.add_metadata_json("nanochat", json.dumps(self._about()))
            # Holistic Trace Analysis asks for the rank. Of several, torch writes it.
            if not (dist.is_available() and dist.is_initialized()):
                alone = dict(backend="", rank=0, world_size=1)
                self.profiler.add_metadata_json("distributedInfo", json.dumps(alone))
            self.profiler.stop()
            self.over = True
            self.open.close()
            if self.watched.at_once:
                self._write(self.profiler)

    def end(self) -> None:
        """No more steps come: what was recorded is written, or why nothing was is said."""
        if self.over and self.profiler:
            self._write(self.profiler)
        elif not self.over:
            self._drop()
            name, missing = self.watched.name, WARM + 1 + self.steps - self.done
            message = f"{name}: not recorded: {_needs(self.steps)}, and it took {self.done}, {missing} too few"
            print(f"{message}; {self.watched.more}" if self.watched.more else message)

    def _drop(self) -> None:
        """Ends it with nothing recorded."""
        self.over, profiler, self.profiler = True, self.profiler, None
        if profiler:
            with suppress(Exception):  # of a profiler that has failed
                profiler.stop()
        self.open.close()

    def _start(self) -> profile:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.watched.hardware.device.type == "cuda")
        profiler = profile(
            activities=kinds,
            schedule=schedule(wait=0, warmup=1, active=self.steps, repeat=1),
            record_shapes=True,
            profile_memory=True,
        )
        self.open.enter_context(self.sampler)
        mark = _collections()
        gc.callbacks.append(mark)
        self.open.callback(gc.callbacks.remove, mark)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*clears events at the end of each cycle")  # there is one cycle
            profiler.start()
        return profiler

    def _about(self) -> dict[str, Any]:
        """What a trace does not know, written into it: with it the page can be made again from the trace alone."""
        before, recorded = self.ms["unrecorded"], self.ms["recorded"]
        return dict(
            self.watched.about(self.steps),
            stage=self.watched.name,
            unrecorded_ms=min(before, default=None),  # the trainer collects garbage in one of them
            recorded_ms=statistics.mean(recorded) if recorded else None,  # a step alone is not whole on a GPU
            world=self.watched.hardware.world,
            device=self.watched.hardware.name,
            torch=torch.__version__,
            nvml=list(self.sampler.rows),
            beside=self.beside,
        )

    def _write(self, profiler: profile) -> None:
        name, self.profiler = self.watched.name, None
        try:
            profiler.export_chrome_trace(str(self.path))
        except Exception as problem:  # noqa: BLE001  # as above
            print(f"{name}: not recorded: {problem}")
            return
        try:
            made, _ = step_page.write(self.path, self.path.parent)
            print(f"{name}: {self.steps} steps recorded: {made} (the trace for ui.perfetto.dev beside it)")
        except Exception as problem:  # noqa: BLE001  # a page is not worth a training run
            print(f"{name}: the trace is {self.path}, but its page could not be made: {problem}")


def _collections() -> Callable[[str, dict[str, int]], None]:
    """For gc.callbacks: a collection shows in the trace."""
    marks: list[Any] = []

    def mark(when: str, about: dict[str, int]) -> None:
        if when == "start":
            marks.append(record_function(GC))
            marks[-1].__enter__()
        elif marks:
            marks.pop().__exit__(None, None, None)

    return mark
