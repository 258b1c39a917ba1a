"""The one training loop of base, mid and SFT.

`train` runs steps from wherever the state stands to the last one: gradient accumulation, schedules, evaluation,
samples, checkpoints. A checkpoint is taken before anything that could fail (an evaluation) and holds everything that
the next step depends on, so a resumed run takes the same steps as one that was never stopped; a thread writes it
(nanochat/saving.py), and however training ends, it is written first. SIGINT and SIGTERM let the step finish, save, and
end the process with a code of its own; a second one ends it at once.
"""

import gc
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from nanochat import checkpoint
from nanochat.consensus import same_checkpoint
from nanochat.cost import flops_per_token
from nanochat.data.loader import Batch, LoaderState, Prefetch
from nanochat.errors import UserError
from nanochat.evaluate.bits_per_byte import Score, bits_per_byte, compiled_score, score
from nanochat.files import write_atomically
from nanochat.gpt import GPT
from nanochat.hardware import Hardware, compile_cache, mark_compiling
from nanochat.launch import ONE_PRESS
from nanochat.optim import MuonAdamW
from nanochat.progress import Progress
from nanochat.ranks import Shared, any_rank
from nanochat.recipe import Schedule
from nanochat.saving import Saver

BAD_STEPS = 5  # so many steps in a row with a loss that is no number end the run


@dataclass
class Settings:
    """What the loop reads. Counts are optimizer steps; batch sizes as named."""

    num_iterations: int
    device_batch_size: int  # rows of a micro-batch on one device
    max_seq_len: int
    total_batch_size: int  # tokens of a step, all ranks together
    eval_every: int = -1  # −1: only at the end
    save_every: int = -1
    sample_every: int = -1

    def accumulation(self, world: int) -> int:
        """Micro-batches per step. Raises UserError when the total batch is no multiple of what runs at a time."""
        rows = self.device_batch_size * self.max_seq_len * world
        if self.device_batch_size < 1 or self.total_batch_size % rows or self.total_batch_size < rows:
            raise UserError(
                f"--total-batch-size {self.total_batch_size} is no multiple of --device-batch-size "
                f"{self.device_batch_size} x --max-seq-len {self.max_seq_len} x {world} ranks = {rows} tokens"
            )
        return self.total_batch_size // rows


@dataclass
class State:
    """All that changes from step to step, but the tensors in model and optimizer."""

    step: int = 0
    loader: LoaderState | None = None
    seconds: float = 0.0  # spent in training steps
    smooth_loss: float = 0.0  # exponential mean of the loss, not yet debiased
    val_bpb: float | None = None
    evaluated_step: int = -1  # to which step val_bpb belongs
    val_tokens: int = 0  # over how many tokens it was taken
    skipped: int = 0  # steps whose loss was no finite number
    scaler: dict[str, Any] | None = None  # of the float16 loss scaling

    def numbers(self) -> dict[str, Any]:
        """What goes into a checkpoint's JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "loader"}


@dataclass
class Stage:
    """One stage of training, ready to run: what `train` works on."""

    name: str
    folder: Path
    model: GPT
    optimizer: MuonAdamW
    schedule: Schedule
    settings: Settings
    hardware: Hardware
    batches: Callable[[LoaderState | None], Iterable[Batch]]
    val_batches: Callable[[], Iterable[Batch]]  # of the last validation
    token_bytes: Tensor
    meta: dict[str, Any]  # goes into every checkpoint
    between_batches: Callable[[], Iterable[Batch]] | None = None  # of those before, where they are fewer
    sample: Callable[[], list[str]] = lambda: []
    compile: bool = False
    compile_evaluation: bool = False
    log: Callable[[dict[str, Any]], None] = lambda row: None
    after_step: Callable[[], None] = lambda: None  # of whoever watches: profiling/record.py
    state: State = field(default_factory=State)
    saved_step: int = 0  # of the newest checkpoint
    scaler: torch.amp.GradScaler | None = None  # float16 only
    saver: Saver = field(init=False)

    def __post_init__(self) -> None:
        self.saver = Saver(self.folder, pinned=self.hardware.device.type == "cuda")

    def due(self, every: int) -> bool:
        """Whether something done every so many steps is to be done now."""
        return every > 0 and self.state.step > 0 and self.state.step % every == 0

    def save_due(self) -> bool:
        """Every save_every steps, and before an evaluation, which could fail."""
        return self.due(self.settings.save_every) or self.evaluation_due()

    def pause_follows(self) -> bool:
        """Whether something else than another step comes after the one that is being taken."""
        settings, after = self.settings, self.state.step + 1
        some = (settings.eval_every, settings.save_every, settings.sample_every)
        return after == settings.num_iterations or any(every > 0 and after % every == 0 for every in some)

    def evaluation_due(self) -> bool:
        """At the end, and every eval_every steps, once."""
        now = self.state.step == self.settings.num_iterations or self.due(self.settings.eval_every)
        return now and self.state.evaluated_step != self.state.step


class Interrupt:
    """Notes SIGINT and SIGTERM instead of dying of them; another one, some seconds later, is deadly again.

    What follows at once is the same wish: a terminal, a launcher and a scheduler may all hand it on.
    """

    def __init__(self) -> None:
        self.received = self.at_once = False
        self._when = 0.0
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number: int, frame: object) -> None:
        if self.received and time.monotonic() - self._when < ONE_PRESS:
            return
        if self.received:
            self.at_once = True
            self.restore()
            raise KeyboardInterrupt
        self.received, self._when = True, time.monotonic()
        print("\nStopping after this step; once more to stop at once.", file=sys.stderr, flush=True)

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def resume(stage: Stage) -> checkpoint.Checkpoint | None:
    """Puts the stage where its newest complete checkpoint left it, and returns that; None when there is none."""
    if stage.hardware.is_main:
        checkpoint.settle(stage.folder)
    found = same_checkpoint(lambda: checkpoint.latest(stage.folder))
    if found is None:
        return None
    for key in ("tokenizer", "data", "plan"):
        if found.meta[key] != stage.meta[key]:
            raise UserError(
                f"{found.folder} was made with another {key} ({found.meta[key]}) than asked for now "
                f"({stage.meta[key]}); give --fresh to train the stage again, or another --run"
            )
    stage.model.load_state_dict(found.tensors("model"))
    stage.model.set_dtype(stage.model.dtype)
    stage.optimizer.load_full_state(found.tensors("optimizer"))
    stage.meta["kernels"] = found.meta.get("kernels")
    stage.state = State(**found.meta["state"])
    loader = found.tensors("loader")
    stage.state.loader = LoaderState.restore(found.meta["loader"], loader)
    torch.set_rng_state(loader["torch_rng"])
    if stage.scaler and stage.state.scaler:
        stage.scaler.load_state_dict(stage.state.scaler)
    if histories := stage.model.histories():
        for name, tensor in found.tensors("fp8").items():
            histories[name].copy_(tensor)
    stage.saved_step = stage.state.step
    return found


def save(stage: Stage, finished: bool) -> None:
    """Takes a checkpoint, which rank 0 writes in a thread; the others only hand over their shares of the optimizer."""
    moments = stage.optimizer.moments()
    stage.saved_step = stage.state.step
    if not stage.hardware.is_main:
        for name in checkpoint.in_order(moments):
            moments[name].whole()
        return
    state, model = stage.state, stage.model
    assert state.loader is not None
    state.scaler = stage.scaler.state_dict() if stage.scaler else None
    meta = dict(
        stage.meta,
        stage=stage.name,
        step=state.step,
        finished=finished,
        state=state.numbers(),
        loader=state.loader.metadata(),
        peak_memory=stage.hardware.peak_memory(),
        config=asdict(model.config),
    )
    weights, histories = model.state_dict(), model.histories()
    changing: dict[str, Any] = dict(model=weights, optimizer=moments, fp8=histories)
    if not histories:
        del changing["fp8"]
    loader = dict(state.loader.tensors(), torch_rng=torch.get_rng_state())
    size = sum(tensor.nbytes for tensor in (*weights.values(), *histories.values())) + stage.optimizer.state_bytes()
    stage.saver.save(meta, changing, dict(loader=loader), size)


def train(stage: Stage) -> None:
    """Runs the stage to its end and leaves a finished checkpoint. Raises KeyboardInterrupt when stopped by a signal."""
    settings, state, hardware = stage.settings, stage.state, stage.hardware
    accumulation = settings.accumulation(hardware.world)
    model = runnable(stage)
    flops = flops_per_token(stage.model.config) * settings.total_batch_size
    data = Prefetch(iter(stage.batches(state.loader)), device=hardware.device)
    progress = Progress(stage.name, settings.num_iterations, state.step, hardware.is_main)
    interrupt = Interrupt()
    counting: Score = compiled_score(progress.note) if stage.compile_evaluation else score
    first = state.step
    bad = 0
    stop = False  # told to, as all ranks know it
    compiling = mark_compiling(compile_cache()) if stage.compile else None
    try:
        while True:
            stop = interrupt.received if hardware.world == 1 else stop
            if stage.evaluation_due() and not stop:
                stop = _evaluate(stage, interrupt, progress, counting)
            stage.saver.check()
            if stop:
                if state.step > first and state.step != stage.saved_step:
                    save(stage, finished=False)
                stage.saver.wait()
                hardware.barrier()  # a rank that ends before rank 0 has written would have its launcher kill it
                progress.note(f"{stage.name}: stopped at step {stage.saved_step}, saved")
                raise KeyboardInterrupt
            if state.step == settings.num_iterations:
                break
            started = time.perf_counter()
            loss, ok, stop = step(stage, model, data, accumulation, lambda: interrupt.received)
            if stage.pause_follows():
                hardware.synchronize()  # or what a GPU still has to do would be nobody's time
            seconds = time.perf_counter() - started
            bad = 0 if ok else bad + 1
            if bad == BAD_STEPS:
                raise UserError(
                    f"{stage.name}: the loss was no finite number {bad} steps in a row up to step {state.step}; "
                    "lower the learning rates, or look at the data around there"
                )
            _account(stage, progress, loss, ok, seconds, flops)
            stage.after_step()
            if stage.save_due():
                save(stage, finished=False)
            if stage.due(settings.sample_every) and hardware.is_main:
                for text in stage.sample():
                    progress.note(f"  {text}")
            if state.step == first + 1:
                if compiling:
                    compiling.unlink(missing_ok=True)
                gc.collect()  # or the collector scans the whole model again and again, up to half a second each time
                gc.freeze()
        save(stage, finished=True)
        stage.saver.wait()
    finally:
        stage.saver.close(wait=not interrupt.at_once)
        progress.close()
        interrupt.restore()
        data.close()
        gc.unfreeze()  # or it is never taken apart, of which Triton's bindings complain when Python ends


def runnable(stage: Stage) -> Any:
    """The model as the loop calls it: compiled where asked for, as is the optimizer.

    On GPUs, weights are cast once a step, and the gradients of tables are added where they are kept.
    """
    if stage.hardware.device.type == "cuda":
        stage.model.keep_gradients(stage.optimizer)
        if stage.model.dtype != torch.float32 and not stage.model.fp8:
            stage.model.keep_shadows(stage.optimizer)
    if not stage.compile:
        return stage.model
    stage.optimizer.compile()
    return torch.compile(stage.model, dynamic=False)


def _account(stage: Stage, progress: Progress, loss: float, ok: bool, seconds: float, flops: int) -> None:
    """Moves the state on by one step, shows it and logs it."""
    state, hardware = stage.state, stage.hardware
    multiplier = stage.schedule.lr(state.step)
    state.step += 1
    state.seconds += seconds
    state.skipped += not ok
    if ok:
        state.smooth_loss = 0.9 * state.smooth_loss + 0.1 * loss
    mean = state.smooth_loss / (1 - 0.9 ** max(1, state.step - state.skipped))
    rate = stage.settings.total_batch_size / seconds
    mfu = flops / seconds / (hardware.peak.bf16 * 1e12 * hardware.world) if hardware.peak else None
    progress.update(state.step, mean, rate, mfu)
    if hardware.is_main:
        stage.log(dict(step=state.step, loss=loss, smooth_loss=mean, lr=multiplier, tok_per_s=rate, mfu=mfu))


def step(
    stage: Stage,
    model: Any,
    data: Iterator[Batch],
    accumulation: int,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[float, bool, bool]:
    """One optimizer step: (mean loss over the micro-batches of all ranks, whether the parameters were updated, and
    whether `stop` of a rank said so when its last forward was queued).

    A GPU may still be at work on it, up to a whole backward and update.

    Its parts carry names for a profiler (profiling/analysis.py); without one, a name costs some ten microseconds.
    """
    state, schedule, optimizer, scaler = stage.state, stage.schedule, stage.optimizer, stage.scaler
    total = torch.zeros((), device=stage.hardware.device)
    for left in reversed(range(accumulation)):
        with record_function("data"):
            batch = next(data)
            inputs, targets = batch.to(stage.hardware.device)
        if state.step == 0 and state.loader is None:
            calibrate(stage.model, optimizer, inputs, targets, stage.hardware.world)
        with record_function("forward"):
            loss = model(inputs, targets) / accumulation
        total += loss.detach()
        if not left:
            shared = Shared(total, stop(), stage.hardware.world)
        with record_function("backward"):
            (scaler.scale(loss) if scaler else loss).backward()
        state.loader = batch.state
    if stage.hardware.world > 1:
        agree(stage.model)
    multiplier = schedule.lr(state.step)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier
        if group["kind"] == "muon":
            group["momentum"] = schedule.momentum(state.step)
            group["weight_decay"] = group["initial_weight_decay"] * schedule.weight_decay(state.step)
    loss_sum, told = shared.read()
    mean = loss_sum / stage.hardware.world
    ok = math.isfinite(mean)
    with record_function("optimizer"):
        if scaler:
            scaler.unscale_(optimizer)
            for found in scaler._found_inf_per_device(optimizer).values():
                if stage.hardware.world > 1:
                    dist.all_reduce(found, op=dist.ReduceOp.MAX)
            scaler.step(optimizer)
            scaler.update()
        elif ok:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return mean, ok, told > 0


CALIBRATION = 3  # passes, each with the scales that the one before found


def calibrate(model: GPT, optimizer: MuonAdamW, inputs: Tensor, targets: Tensor, world: int) -> None:
    """Fills fresh histories of fp8's delayed scaling from one row of the first batch; nothing without them."""
    histories = model.histories().values()
    for _ in range(CALIBRATION if histories else 0):
        model(inputs[:1], targets[:1]).backward()
        optimizer.zero_grad(set_to_none=True)
        if world > 1:
            agree(model)
        for history in histories:
            history.copy_(history[:, :1])  # what was guessed before is forgotten


def agree(model: GPT) -> None:
    """The largest of all ranks' maxima becomes everyone's, so that a resumed run does not depend on its rank."""
    histories = list(model.histories().values())
    if histories:
        flat = torch.cat([history.flatten() for history in histories])
        dist.all_reduce(flat, op=dist.ReduceOp.MAX)
        for history, part in zip(histories, flat.split([history.numel() for history in histories])):
            history.copy_(part.view_as(history))


def _evaluate(stage: Stage, interrupt: Interrupt, progress: Progress, counting: Score) -> bool:
    """Sets val_bpb. Told to stop (True), it forgets the half evaluation; the resumed run makes it again."""
    state, last = stage.state, stage.state.step == stage.settings.num_iterations
    batches = stage.val_batches if last else stage.between_batches or stage.val_batches
    data, tokens = Prefetch(iter(batches()), device=stage.hardware.device), 0

    def counted() -> Iterator[Batch]:
        nonlocal tokens
        for batch in data:
            tokens += batch.inputs.numel() * stage.hardware.world
            yield batch

    compiling = mark_compiling(compile_cache()) if stage.compile_evaluation else None
    stage.model.eval()
    try:
        value = bits_per_byte(stage.model, counted(), stage.token_bytes, lambda: interrupt.received, counting)
    finally:
        data.close()
    stage.model.train()
    if compiling:
        compiling.unlink(missing_ok=True)
    if any_rank(interrupt.received, stage.hardware):
        return True
    state.val_bpb, state.evaluated_step, state.val_tokens = value, state.step, tokens
    kind = "validation" if last else "intermediate validation"
    progress.note(f"{stage.name} step {state.step}: {kind} {value:.4f} bits per byte, {tokens:,} tokens")
    if stage.hardware.is_main:
        stage.log(dict(step=state.step, val_bpb=value, val_tokens=tokens, final=last))
    return False


def json_log(path: Path, step: int, evaluated: int) -> Callable[[dict[str, Any]], None]:
    """Appends each row to a JSON-lines file, after dropping what an earlier attempt logged beyond `step`, and its
    validations beyond step `evaluated`: they are made again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = read_log(path) if step else []
    kept = [row for row in rows if row["step"] <= (evaluated if "val_bpb" in row else step)]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept).encode())

    def write(row: dict[str, Any]) -> None:
        with open(path, "a") as f:
            f.write(json.dumps(row) + "\n")

    return write


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; a last line that was cut off by a crash is dropped."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
