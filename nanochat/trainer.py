"""The one training loop of base, mid, SFT and RL.

`train` runs steps from wherever the state stands to the last one: gradient accumulation, schedules, evaluation,
samples, checkpoints. A checkpoint is taken before anything that could fail (an evaluation) and holds everything that
the next step depends on, so a resumed run takes the same steps as one that was never stopped; a thread writes it
(nanochat/saving.py), and however training ends, it is written first. SIGINT and SIGTERM let the step finish, save, and
end the process with a code of its own; a second one ends it at once, and so does the first when nothing is to be saved.

A step (nanochat/step.py) that goes wrong changes nothing. Where its loss or gradient is NaN or infinite it is bad:
nothing is saved before a good one, and several in a row end the run.
"""

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat import checkpoint, typed
from nanochat.consensus import same_checkpoint
from nanochat.cost import flops_per_token
from nanochat.data.loader import Batch, LoaderState, Prefetch
from nanochat.errors import UserError
from nanochat.evaluate.bits_per_byte import Score, bits_per_byte, compiled_score, score
from nanochat.files import clear_leftovers
from nanochat.gpt import GPT
from nanochat.hardware import Hardware, compile_cache, mark_compiling
from nanochat.interrupt import Interrupt
from nanochat.optim import MuonAdamW
from nanochat.progress import Progress
from nanochat.ranks import any_rank
from nanochat.recipe import Schedule
from nanochat.replay import Replayed
from nanochat.saving import Saver
from nanochat.step import WINDOW, Outcome, step

BAD_STEPS = 5  # so many in a row end the run


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
    smoothed: int = 0  # over how many steps
    recent: list[float] = field(default_factory=list)  # losses of the last steps, for step.is_spike
    val_bpb: float | None = None
    evaluated_step: int = -1  # to which step val_bpb belongs
    val_tokens: int = 0  # over how many tokens it was taken
    evaluations: int = 0  # so far: each has its row in the log, as each step has
    skipped: int = 0  # steps that changed nothing
    tokens: int = 0  # that steps ran, where those are not of a fixed size
    scaler: dict[str, Any] | None = None  # of the float16 loss scaling

    @property
    def mean_loss(self) -> float:
        """Over the last ten steps or so."""
        return self.smooth_loss / (1 - 0.9 ** max(1, self.smoothed))

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
    replay: bool = True  # a compiled step as CUDA graphs, on an NVIDIA GPU
    compile_evaluation: bool = False
    log: Callable[[dict[str, Any]], None] = lambda row: None
    after_step: Callable[[], None] = lambda: None  # of whoever watches: profiling/recorded/record.py
    take: Callable[..., Outcome] | None = None  # what a step is, where it is not `step`: nanochat/rl.py has another
    # Instead of bits per byte, and then before the first step too: what is logged and a sentence, or None if stopped.
    examine: Callable[["Stage", Callable[[], bool]], tuple[dict[str, Any], str] | None] | None = None
    state: State = field(default_factory=State)
    saved_step: int = 0  # of the newest checkpoint
    spike_guard: bool = True
    bad: int = 0  # bad steps in a row
    owed: bool = False  # whether a checkpoint is due that waits for a good step
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

    def unsaved(self, first: int) -> bool:
        """Whether an end now would lose anything. first: the step at which this process began.

        Of several ranks none ends by itself once a step is taken: rank 0 may be saving with their help.
        """
        taken = self.state.step > first
        return self.saver.busy or (taken and (self.hardware.world > 1 or self.state.step != self.saved_step))

    def pause_follows(self) -> bool:
        """Whether something else than another step comes after the one that is being taken."""
        settings, after = self.settings, self.state.step + 1
        some = (settings.eval_every, settings.save_every, settings.sample_every)
        return after == settings.num_iterations or any(every > 0 and after % every == 0 for every in some)

    def evaluation_due(self) -> bool:
        """At the end, and every eval_every steps, once; where it is an examination, at the beginning."""
        now = self.state.step == self.settings.num_iterations or self.due(self.settings.eval_every)
        now = now or (self.examine is not None and self.state.step == 0)
        return now and self.state.evaluated_step != self.state.step


def resume(stage: Stage) -> checkpoint.Checkpoint | None:
    """Puts the stage where its newest complete checkpoint left it, and returns that; None when nothing was saved.

    Raises UserError when what was saved cannot be gone on with.
    """
    if stage.hardware.is_main:
        checkpoint.settle(stage.folder)
        clear_leftovers(stage.folder)
    found = same_checkpoint(lambda: checkpoint.to_resume(stage.folder))
    if found is None:
        return None
    for key in ("tokenizer", "data", "plan"):
        if found.meta.get(key) != stage.meta[key]:
            raise UserError(
                f"{found.folder} was made with another {key} ({found.meta.get(key)}) than asked for now "
                f"({stage.meta[key]}); give --fresh to train the stage again, or another --run"
            )
    stage.model.load_state_dict(found.weights(stage.model))
    stage.model.set_dtype(stage.model.dtype)
    with checkpoint.same_version(found.folder):
        stage.optimizer.load_full_state(found.tensors("optimizer"))
        _restore(stage, found)
    return found


def _restore(stage: Stage, found: checkpoint.Checkpoint) -> None:
    """All but weights and moments. Raises as a file that another version wrote does: see checkpoint.same_version."""
    stage.meta["kernels"] = found.meta.get("kernels")
    stage.state = typed.made(State, found.meta["state"])
    loader = found.tensors("loader")
    stage.state.loader = LoaderState.restore(found.meta["loader"], loader, stage.model.config.vocab_size)
    torch.set_rng_state(loader["torch_rng"])
    if stage.scaler and stage.state.scaler:
        stage.scaler.load_state_dict(stage.state.scaler)
    if histories := stage.model.histories():
        for name, tensor in found.tensors("fp8").items():
            histories[name].copy_(tensor)
    stage.saved_step = stage.state.step


def save(stage: Stage, finished: bool) -> None:
    """Takes a checkpoint, which rank 0 writes in a thread; the others only hand over their shares of the optimizer."""
    moments = stage.optimizer.moments()
    if not stage.hardware.is_main:
        for name in checkpoint.in_order(moments):
            moments[name].whole()
        stage.saved_step, stage.owed = stage.state.step, False
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
    stage.saved_step, stage.owed = state.step, False


def train(stage: Stage) -> None:
    """Runs the stage to its end and leaves a finished checkpoint. Raises KeyboardInterrupt when stopped by a signal."""
    settings, state, hardware = stage.settings, stage.state, stage.hardware
    accumulation = settings.accumulation(hardware.world)
    model = runnable(stage)
    flops = flops_per_token(stage.model.config) * settings.total_batch_size
    data = Prefetch(iter(stage.batches(state.loader)), device=hardware.device)
    progress = Progress(stage.name, settings.num_iterations, state.step, hardware.is_main)
    counting: Score = compiled_score(progress.note) if stage.compile_evaluation else score
    first = state.step
    interrupt = Interrupt(lambda: stage.unsaved(first))
    stop = False  # told to, as all ranks know it
    compiling = mark_compiling(compile_cache()) if stage.compile else None
    try:
        while True:
            stop = interrupt.received if hardware.world == 1 else stop
            if stage.evaluation_due() and not stop and (not stage.owed or state.step == settings.num_iterations):
                stop = _evaluate(stage, interrupt, progress, counting)
            stage.saver.check()
            if stop:
                _count(stage, progress, state.step, stage.optimizer.finish_step())
                if state.step > first and state.step != stage.saved_step and not stage.bad:
                    save(stage, finished=False)
                stage.saver.wait()
                hardware.barrier()  # a rank that ends before rank 0 has written would have its launcher kill it
                there = ", saved" if stage.saved_step == state.step else f"; last saved was step {stage.saved_step}"
                progress.note(f"{stage.name}: stopped at step {state.step}{there}")
                raise KeyboardInterrupt
            if state.step == settings.num_iterations:
                break
            started = time.perf_counter()
            outcome = (stage.take or step)(stage, model, data, accumulation, lambda: interrupt.received)
            stop = outcome.stop
            if stage.pause_follows():
                hardware.synchronize()  # or what a GPU still has to do would be nobody's time
                if isinstance(model, Replayed):
                    model.drop()
            seconds = time.perf_counter() - started
            known = hardware.device.type == "cpu" or stage.pause_follows() or stage.owed or stop
            judge(stage, progress, outcome, known)
            _account(stage, progress, outcome, seconds, flops)
            stage.after_step()
            stage.owed = stage.owed or stage.save_due()
            if stage.owed and not stage.bad:
                save(stage, finished=False)
            if stage.due(settings.sample_every) and hardware.is_main:
                for text in stage.sample():
                    progress.note(f"  {text}")
            if state.step == first + 1:
                if state.loader and (complaint := state.loader.complaint()):
                    progress.note(f"{stage.name}: {complaint}")
                if compiling:
                    compiling.release()
                gc.collect()  # or the collector scans the whole model again and again, up to half a second each time
                gc.freeze()
        save(stage, finished=True)
        stage.saver.wait()
        hardware.barrier()  # or another rank could be told to end, and its launcher would end rank 0, which writes
    finally:
        stage.saver.close(wait=not interrupt.at_once)
        progress.close()
        interrupt.restore()
        data.close()
        gc.unfreeze()  # or it is never taken apart, of which Triton's bindings complain when Python ends


def runnable(stage: Stage, updates: bool = True) -> Any:
    """The model as the loop calls it: compiled where asked for, as is the optimizer, but with updates = False.

    On GPUs, weights are cast once a step, and gradients are added where they are kept; compiled on an NVIDIA one, it is
    replayed.
    """
    if stage.hardware.device.type == "cuda":
        stage.model.keep_gradients(stage.optimizer)
        if stage.model.dtype != torch.float32 and not stage.model.fp8:
            stage.model.keep_shadows(stage.optimizer)
    if not stage.compile:
        return stage.model
    if updates:
        stage.optimizer.compile()
    model = torch.compile(stage.model, dynamic=False)
    if stage.hardware.device.type == "cuda" and not torch.version.hip:
        return Replayed(model, stage.optimizer, stage.hardware.device, lambda: stage.replay)
    return model


def judge(stage: Stage, progress: Progress, outcome: Outcome, known: bool) -> None:
    """Counts the steps that changed nothing. known: whether a GPU's word on the step just taken is waited for.

    Raises UserError after BAD_STEPS bad ones in a row; a spike is none.
    """
    number = stage.state.step + 1
    _count(stage, progress, number - 1, outcome.before)
    if outcome.spike:
        stage.state.skipped += 1
        progress.note(f"{stage.name} step {number}: skipped, its loss {outcome.loss:.4f} is a spike (--no-spike-guard)")
    elif not math.isfinite(outcome.loss):
        _bad(stage, progress, number, f"its loss is {outcome.loss}")
    elif known:
        _count(stage, progress, number, stage.optimizer.finish_step())


def _count(stage: Stage, progress: Progress, number: int, taken: bool | None) -> None:
    if taken:
        stage.bad = 0
    elif taken is False and stage.scaler and stage.scaler.get_scale() >= 1:
        stage.state.skipped += 1  # float16's loss scale was too large, and is smaller now
    elif taken is False:
        _bad(stage, progress, number, "its gradient is not finite")


def _bad(stage: Stage, progress: Progress, number: int, why: str) -> None:
    stage.state.skipped += 1
    stage.bad += 1
    progress.note(f"{stage.name} step {number}: nothing was changed, {why}")
    if stage.bad == BAD_STEPS:
        raise UserError(
            f"{stage.name}: loss or gradient was not finite {BAD_STEPS} steps in a row up to step {number}; "
            f"the last checkpoint is of step {stage.saved_step}; lower the learning rates, or look at the data there"
        )


def _account(stage: Stage, progress: Progress, outcome: Outcome, seconds: float, flops: int) -> None:
    """Moves the state on by one step, shows it and logs it."""
    state, hardware, loss = stage.state, stage.hardware, outcome.loss
    multiplier = stage.schedule.lr(state.step)
    state.step += 1
    state.seconds += seconds
    if math.isfinite(loss):
        state.recent = [*state.recent, loss][-WINDOW:]
        if not outcome.spike:
            state.smooth_loss = 0.9 * state.smooth_loss + 0.1 * loss
            state.smoothed += 1
    mean = state.mean_loss
    state.tokens += outcome.tokens or 0
    rate = (outcome.tokens or stage.settings.total_batch_size) / seconds
    peak = hardware.peak.bf16 * 1e12 * hardware.world if hardware.peak and outcome.tokens is None else None
    mfu = flops / seconds / peak if peak else None
    progress.update(state.step, mean, rate, mfu, outcome.said)
    if hardware.is_main:
        row = dict(step=state.step, loss=loss, smooth_loss=mean, lr=multiplier, tok_per_s=rate, mfu=mfu)
        stage.log({**row, **outcome.row})


def _evaluate(stage: Stage, interrupt: Interrupt, progress: Progress, counting: Score) -> bool:
    """Sets val_bpb. Told to stop (True), it forgets the half evaluation; the resumed run makes it again."""
    state, last = stage.state, stage.state.step == stage.settings.num_iterations
    if stage.examine:
        found = stage.examine(stage, lambda: interrupt.received)
        if any_rank(interrupt.received, stage.hardware) or not found:
            return True
        row, said = found
        state.evaluated_step, state.evaluations = state.step, state.evaluations + 1
        progress.note(f"{stage.name} step {state.step}: {said}")
        if stage.hardware.is_main:
            stage.log(dict(step=state.step, final=last, **row))
        return False
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
        compiling.release()
    if any_rank(interrupt.received, stage.hardware):
        return True
    state.val_bpb, state.evaluated_step, state.val_tokens = value, state.step, tokens
    state.evaluations += 1
    kind = "validation" if last else "intermediate validation"
    progress.note(f"{stage.name} step {state.step}: {kind} {value:.4f} bits per byte, {tokens:,} tokens")
    if stage.hardware.is_main:
        stage.log(dict(step=state.step, val_bpb=value, val_tokens=tokens, final=last))
    return False
