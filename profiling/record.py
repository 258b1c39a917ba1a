"""`--profile N` of a training script: N warm steps are recorded, and the page about them is written; training goes on.

A `Recorder` is called after each step. It lets the first steps pass (compiling, growing caches), lets torch's profiler
warm up for one more, records N, and leaves in <run>/<stage>/profile/ the trace, profile.json and profile.html. Rank 0
alone records. Meanwhile the card's sensors are sampled and garbage collections marked. Nothing that training computes
is touched: losses are the same to the bit. A step is somewhat slower while it is recorded, and the page says so.
"""

import gc
import json
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from nanochat.cost import training_flops
from nanochat.errors import UserError
from nanochat.trainer import Stage
from profiling import lab_page
from profiling.idle import GC
from profiling.nvml import Sampler

WARM = 3  # steps that pass unseen


def watcher(steps: int) -> Callable[[Stage], Callable[[], None]] | None:
    """For Setup.watch: None for no steps. Raises UserError for a negative number."""
    if steps < 0:
        raise UserError(f"--profile is {steps}, wanted how many steps to record, or 0")
    return (lambda stage: Recorder(stage, steps).after_step) if steps else None


class Recorder:
    """See the module. Raises UserError when the stage has too few steps left."""

    def __init__(self, stage: Stage, steps: int):
        left = stage.settings.num_iterations - stage.state.step
        needed = WARM + 1 + steps
        if left < needed:
            raise UserError(
                f"--profile {steps} needs {needed} steps, the first {WARM + 1} to get warm, and {stage.name} has "
                f"{left} left; train longer (--num-iterations), or begin it again (--fresh)"
            )
        self.stage, self.steps, self.done = stage, steps, 0
        self.path = stage.folder / "profile" / "trace-rank0.json.gz"
        self.sampler = Sampler(stage.hardware.device.index or 0)
        self.open = ExitStack()  # what is undone when the recording ends
        self.beside: list[str] = []  # what training does between the recorded steps: it lies inside their time

    def after_step(self) -> None:
        self.done += 1
        if WARM < self.done <= WARM + self.steps:
            self.beside += self._due()
        if self.done == WARM:
            self._start()
        elif WARM < self.done <= WARM + 1 + self.steps:
            last = self.done == WARM + 1 + self.steps
            if last or self.done == WARM + 1:
                self.stage.hardware.synchronize()  # so that the steps recorded are whole on the device too
            if last:
                self.profiler.add_metadata_json("nanochat", json.dumps(self._about()))
            self.profiler.step()
            if last:
                self._finish()

    def _due(self) -> list[str]:
        """What nanochat/trainer.py does after this step, before the next."""
        stage = self.stage
        saved = stage.due(stage.settings.save_every) or stage.evaluation_due()
        due = dict(checkpoint=saved, samples=stage.due(stage.settings.sample_every), evaluation=stage.evaluation_due())
        return [f"{what} after step {stage.state.step}" for what, now in due.items() if now]

    def _start(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.stage.hardware.device.type == "cuda")
        self.profiler = profile(
            activities=kinds,
            schedule=schedule(wait=0, warmup=1, active=self.steps, repeat=1),
            on_trace_ready=lambda made: made.export_chrome_trace(str(self.path)),
            record_shapes=True,
            profile_memory=True,
        )
        self.open.enter_context(self.sampler)
        mark = _collections()
        gc.callbacks.append(mark)
        self.open.callback(gc.callbacks.remove, mark)
        self.profiler.start()

    def _about(self) -> dict[str, Any]:
        """What a trace does not know, written into it: with it the page can be made again from the trace alone."""
        stage = self.stage
        return dict(
            stage=stage.name,
            first_step=stage.state.step - self.steps,
            tokens_per_step=stage.settings.total_batch_size,
            world=stage.hardware.world,
            device=stage.hardware.name,
            dtype=stage.meta["dtype"],
            fp8=stage.meta["plan"].get("fp8"),
            compiled=stage.compile,
            torch=torch.__version__,
            flops_per_token=training_flops(stage.model.config),
            nvml=list(self.sampler.rows),
            beside=self.beside,
        )

    def _finish(self) -> None:
        self.profiler.stop()
        self.open.close()
        try:
            made, _ = lab_page.write(self.path, self.path.parent)
            print(f"{self.stage.name}: {self.steps} steps recorded: {made} (the trace for ui.perfetto.dev beside it)")
        except Exception as problem:  # noqa: BLE001  # a page is not worth a training run
            print(f"{self.stage.name}: the trace is {self.path}, but its page could not be made: {problem}")


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
