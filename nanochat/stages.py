"""Putting a training stage together: what base, mid and SFT have in common around the loop in trainer.py."""

import json
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kernels import dispatch, use
from kernels.fp8.quantize import FP8_ROW, has_units
from nanochat import checkpoint, fresh, measure, optional, trainer
from nanochat.cadence import MFU, PEAK, between, compiling_pays, validated
from nanochat.chat import answers, visible_text
from nanochat.cost import flops_per_token, parameter_counts
from nanochat.data.conversations import ConversationFiles
from nanochat.data.loader import Batch, Encode, Rows, batches, one_pass
from nanochat.data.source import Source
from nanochat.engine import Engine, Request, Sampling
from nanochat.errors import UserError
from nanochat.files import write_atomically
from nanochat.gpt import GPT
from nanochat.hardware import Hardware, can_compile
from nanochat.interrupt import Interrupt
from nanochat.log import LOG, json_log
from nanochat.optim import MuonAdamW
from nanochat.ranks import first_alone, gathered
from nanochat.recipe import Schedule
from nanochat.run import Run
from nanochat.tokenizer import Tokenizer
from nanochat.trainer import Settings, Stage

WANDB = "wandb_id"  # file with the id of the stage's W&B run, which a resumed stage goes on with
SCALINGS = ("current", "delayed")  # of fp8
COMPILE_GAIN = "training runs eagerly, at about half the speed on CPUs"


@dataclass
class Setup:
    """What differs between stages. `plan` is everything that decides the result: a stage resumes under the same plan
    only.
    """

    name: str
    run: Run
    hardware: Hardware
    tokenizer: Tokenizer
    source: Source
    encode: Encode
    model: GPT
    optimizer: MuonAdamW
    schedule: Schedule
    settings: Settings
    rates: dict[str, float]  # learning rates of base training, which later stages start from
    plan: dict[str, Any]
    eval_tokens: int  # of the last validation
    prompts: list[Any]  # strings to continue, or lists of messages to answer
    compile: str = "auto"  # "no" where that was asked for, or why a stage never is
    pad: bool = False
    wandb: bool = False
    spike_guard: bool = True
    tune: bool = True  # whether to measure which kernels pay, where that is not known
    eval_tokens_between: int = -1  # of the validations before; -1: nanochat/cadence.py's default
    watch: Callable[[Stage], Callable[[], None]] | None = None  # given the stage, what to call after each step
    fresh: bool = False  # whether what the stage has trained so far is to be replaced
    work: str = ""  # what a step does, where that is not training on so many tokens
    adapt: Callable[[Stage], None] = lambda stage: None  # the last word on the stage: nanochat/rl_stage.py


def run_stage(setup: Setup) -> None:
    """Trains the stage to its end, going on from its newest checkpoint.

    When it is finished already it does nothing, but for a summary that is missing: that is made again.
    """
    with Interrupt():  # until training begins, and after it, nothing is to be saved
        _run_stage(setup)


def _run_stage(setup: Setup) -> None:
    hardware, settings = setup.hardware, setup.settings
    rows = Rows(
        settings.device_batch_size,
        settings.max_seq_len,
        setup.pad,
        hardware.rank,
        hardware.world,
        pin=hardware.device.type == "cuda",
    )
    bos = setup.tokenizer.bos
    fewer = between(setup.eval_tokens, setup.eval_tokens_between, hardware.device.type)

    def validation(tokens: int) -> Callable[[], Iterator[Batch]]:
        """Makes batches of about so many tokens of the validation split, over all ranks."""
        at_once = rows.B * rows.world
        count = max(1, tokens // rows.T // at_once) * at_once
        return lambda: one_pass(setup.source, "val", setup.encode, rows, count, bos)

    meta = dict(
        tokenizer=setup.tokenizer.fingerprint,
        data=f"{setup.source.name} {setup.source.fingerprint}",
        plan=json.loads(json.dumps(setup.plan)),
        dtype=str(setup.model.dtype),
        rates=setup.rates,
        settings=vars(settings),
    )
    _same_everywhere(setup)
    stage = Stage(
        setup.name,
        setup.run.stage(setup.name),
        setup.model,
        setup.optimizer,
        setup.schedule,
        settings,
        hardware,
        lambda state: batches(setup.source, "train", setup.encode, rows, state, bos),
        validation(setup.eval_tokens),
        setup.tokenizer.token_bytes(),
        meta,
        between_batches=validation(fewer),
        spike_guard=setup.spike_guard,
        sample=lambda: samples(setup),
        scaler=_scaler(hardware, settings) if setup.model.dtype == torch.float16 else None,
    )
    setup.adapt(stage)
    _check(setup, stage, rows)
    if hardware.is_main:
        _begin_again_or_go_on(setup, stage.folder)
    resumed = trainer.resume(stage)
    if resumed and resumed.finished:
        say(setup, f"{setup.name}: already trained, {stage.state.step} steps ({stage.folder})")
        if hardware.is_main and setup.run.summary(setup.name) is None:
            print(f"{setup.name}: summary.json is missing, and made again from that checkpoint", flush=True)
            conclude(setup, stage, resumed.meta)
        return
    stage.compile, reason = _compile(setup)
    tokens = validated(settings.num_iterations, settings.eval_every, fewer, setup.eval_tokens) // hardware.world
    peak = hardware.peak.bf16 * 1e12 if hardware.peak else None
    pays = hardware.device.type == "cuda" and compiling_pays(tokens, flops_per_token(setup.model.config), peak)
    stage.compile_evaluation = stage.compile and pays
    where = f"from step {stage.state.step}" if resumed else "from the beginning"
    say(
        setup,
        f"{setup.name}: {settings.num_iterations} steps of {setup.work or f'{settings.total_batch_size:,} tokens'} on "
        f"{setup.source.name}, {where}; {hardware.device.type} ({hardware.name}), {str(setup.model.dtype)[6:]}, "
        f"{'compiled' if stage.compile else 'eager: ' + reason}",
    )
    choice = _kernels(setup, stage, resumed is not None)
    stage.meta.update(device=hardware.name, world=hardware.world, compiled=stage.compile)
    if hardware.is_main:
        stage.log = _log(setup, stage)
        if setup.watch and not setup.fresh:
            stage.after_step = setup.watch(stage)
    started = time.time()
    with use(choice["setting"]) if choice else nullcontext():
        trainer.train(stage)
    if hardware.is_main:
        session = dict(last_session_seconds=time.time() - started, peak_memory=hardware.peak_memory())
        conclude(setup, stage, {**stage.meta, **session})
    hardware.barrier()


def conclude(setup: Setup, stage: Stage, meta: dict[str, Any]) -> None:
    """Samples and summary of a finished stage. meta: of its last checkpoint, which has all that cannot be computed."""
    said = samples(setup)
    setup.run.write_summary(setup.name, dict(summary(setup, stage, meta), samples=said))
    print("\n".join(f"  {text}" for text in said), flush=True)


def _check(setup: Setup, stage: Stage, rows: Rows) -> None:
    """Raises UserError for what would stop the stage later: before anything is compiled, moved or written."""
    setup.settings.accumulation(setup.hardware.world)
    if isinstance(setup.source, ConversationFiles):  # of other sources there is always something
        alone = replace(rows, B=1, rank=0, world=1, pin=False)  # the same on all ranks
        found = one_pass(setup.source, "val", setup.encode, alone, 1 << 30, setup.tokenizer.bos)
        if not any((stage.token_bytes[batch.targets[batch.targets >= 0]] > 0).any() for batch in found):
            raise UserError(
                f"{setup.source.name} has nothing to validate on: in its validation split no answer of the assistant "
                f"with any text begins within {rows.T} tokens"
            )
    if setup.wandb:
        try:
            optional.package("wandb", "init")
        except ImportError as problem:
            raise UserError(f"--wandb: {problem}; pip install wandb, or leave the flag out") from None
    if (
        setup.fresh and setup.watch and setup.hardware.is_main
    ):  # it refuses where few steps are left: here none is taken
        stage.after_step = setup.watch(stage)


def _begin_again_or_go_on(setup: Setup, folder: Path) -> None:
    """With --fresh, moves aside what was trained so far; without, moves back what such a call has left aside."""
    if setup.fresh and fresh.set_aside(folder, lambda place: checkpoint.latest(place) is not None):
        say(setup, f"{setup.name}: what was trained so far is in {fresh.old(folder)} until the first new checkpoint")
    elif not setup.fresh and fresh.put_back(folder, lambda place: checkpoint.to_resume(place) is not None):
        say(setup, f"note: {setup.name}: training it again came to no checkpoint, so what was trained before is back")


def _kernels(setup: Setup, stage: Stage, resumed: bool) -> measure.Choice | None:
    """Which kernels the stage runs: those it began with, or what is known or measured now for this card.

    None: as `auto` decides. Block sizes are in force when it returns, and the choice goes into every checkpoint. A
    choice that another card was measured for is made anew. Nothing is measured where the training is too short to pay.
    """
    card = (stage.meta.get("kernels") or {}).get("card", setup.hardware.name)
    elsewhere = card != setup.hardware.name
    if elsewhere:
        say(setup, f"{setup.name}: it began with kernels measured for {card}; chosen anew for this card")
    if not resumed or elsewhere:
        config = replace(setup.model.config, sequence_len=setup.settings.max_seq_len)
        rows, fp8 = setup.settings.device_batch_size, setup.plan.get("fp8", "")
        tokens = setup.settings.num_iterations * setup.settings.total_batch_size / setup.hardware.world
        peak = setup.hardware.peak.bf16 * 1e12 if setup.hardware.peak else PEAK
        seconds = tokens * flops_per_token(config) / (MFU * peak)
        pays = seconds > measure.PAYS * measure.SECONDS
        if setup.tune and stage.compile and not pays and setup.hardware.device.type == "cuda":
            say(setup, f"{setup.name}: too short to measure first which kernels pay; taken is what is known")
        wanted = setup.tune and stage.compile and pays
        chosen = measure.choose(config, rows, setup.hardware, fp8, lambda line: say(setup, f"  {line}"), wanted)
        stage.meta["kernels"] = chosen
    choice = stage.meta["kernels"] if dispatch.is_default() else None
    measure.adopt(choice)
    return choice


def _scaler(hardware: Hardware, settings: Settings) -> torch.amp.GradScaler:
    """For float16. It begins where a step of one micro-batch would: each of several has a part of the loss."""
    return torch.amp.GradScaler(hardware.device.type, init_scale=2.0**16 * settings.accumulation(hardware.world))


def set_fp8(model: GPT, hardware: Hardware, settings: Settings, fp8: bool, scaling: str) -> dict[str, str]:
    """Carries out --fp8; returns what the plan says of it.

    Raises UserError when the model, the dtype or the micro-batch forbids it.
    """
    if not fp8:
        return {}
    if hardware.dtype == torch.float16:
        raise UserError("--fp8 goes with bfloat16 or float32 activations, and this run's are float16 (NANOCHAT_DTYPE)")
    rows, tokens = settings.device_batch_size, settings.max_seq_len
    if rows * tokens % FP8_ROW:  # a weight's gradient sums over them
        raise UserError(
            f"--fp8: a micro-batch of {rows} × {tokens} tokens is no multiple of {FP8_ROW}, as fp8 products want it; "
            "change --device-batch-size or --max-seq-len"
        )
    try:
        model.set_fp8(scaling)
    except ValueError as problem:
        raise UserError(f"--fp8: {problem}") from None
    if hardware.is_main and not (hardware.device.type == "cuda" and has_units(hardware.device.index or 0)):
        print(f"note: {hardware.name} has no fp8 units: --fp8 is emulated, exactly and slowly", flush=True)
    return dict(fp8=scaling)


def say(setup: Setup, line: str) -> None:
    if setup.hardware.is_main:
        print(line, flush=True)


def _same_everywhere(setup: Setup) -> None:
    """Raises UserError where a rank has other data or another number of steps than rank 0: it would train on rows that
    are not its own, and leave the others alone in a collective. Collective.
    """
    source, steps = setup.source, setup.settings.num_iterations
    first, *others = gathered((source.fingerprint, steps, source.name), setup.hardware.world)
    for rank, other in enumerate(others, 1):
        if other[:2] != first[:2]:  # the same files may have another path on another machine
            raise UserError(
                f"{setup.name}: rank {rank} has {other[2]}, {other[1]:,} steps, and rank 0 {first[2]}, {first[1]:,} "
                "steps: give all machines the same data, or call again where the network failed"
            )


def _compile(setup: Setup) -> tuple[bool, str]:
    """Whether to compile, as all ranks have it, and if not, why."""
    hardware = setup.hardware
    if setup.compile != "auto":
        return False, "asked for" if setup.compile == "no" else setup.compile
    works, reason = first_alone(lambda: can_compile(hardware.device), hardware)  # it may clear what was left half made
    if hardware.world > 1:
        reasons = gathered("" if works else reason, hardware.world)
        failed = next((rank for rank, why in enumerate(reasons) if why), None)
        works, reason = failed is None, "" if failed is None else f"rank {failed}: {reasons[failed]}"
    return works, f"{reason}; {COMPILE_GAIN}" if hardware.device.type == "cpu" else reason


def _log(setup: Setup, stage: Stage) -> Callable[[dict[str, Any]], None]:
    state = stage.state
    write = json_log(stage.folder / LOG, state.step, state.evaluated_step, state.evaluations)
    if not setup.wandb:
        return write
    name, place = f"{setup.run.name}-{setup.name}", stage.folder / WANDB  # --fresh moves it aside with the stage
    if not (state.step and place.exists()):
        write_atomically(place, secrets.token_hex(8).encode())
    given = dict(project="nanochat-kernels", name=name, id=place.read_text("utf-8").strip(), resume="allow")
    try:
        board = optional.package("wandb", "init").init(config=setup.plan, **given)
    except Exception as problem:  # no key, no network, a service that does not start: each an error of its own
        why = " ".join(f"{type(problem).__name__}: {problem}".split())[:300]
        todo = "log in (wandb login), set WANDB_MODE=offline, or leave the flag out"
        raise UserError(f"--wandb: Weights & Biases cannot be used ({why}); {todo}") from None

    def both(row: dict[str, Any]) -> None:
        nonlocal board
        write(row)
        try:
            if board is not None:
                board.log(row, step=row["step"])
        except Exception as problem:  # its service has ended, say: no reason to end a training
            print(f"note: Weights & Biases gets no more rows ({type(problem).__name__}: {problem})", file=sys.stderr)
            board = None

    return both


def samples(setup: Setup) -> list[str]:
    """What the model says to each prompt, greedily: a continuation, or an answer."""
    was_training = setup.model.training
    state = setup.model.state_dict()
    engine = Engine(copy_of(setup.model, state), slots=len(setup.prompts))
    greedy = Sampling(temperature=0)
    if isinstance(setup.prompts[0], str):
        lines = []
        for prompt in setup.prompts:
            ids = [setup.tokenizer.bos, *setup.tokenizer.encode(prompt)][-(engine.config.sequence_len - 1) :]
            request = Request(ids, 16, greedy)
            text = setup.tokenizer.decode(list(engine.stream(request)))
            lines.append(" ".join(f"{prompt}|{text}".split()))
    else:
        replies = answers(engine, setup.tokenizer, setup.prompts, 48, greedy)
        lines = [f"{p[-1]['content']} → {' '.join(visible_text(r).split())}" for p, r in zip(setup.prompts, replies)]
    setup.model.train(was_training)
    return lines


def copy_of(model: GPT, state: dict[str, torch.Tensor]) -> GPT:
    """A second model with the same weights: the engine keeps its own, cast to the compute dtype."""
    with torch.device("meta"):
        twin = GPT(model.config)
    twin.to_empty(device=model.lm_head.weight.device)
    twin.load_state_dict(state)
    twin.set_dtype(model.dtype)
    return twin


def summary(setup: Setup, stage: Stage, meta: dict[str, Any]) -> dict[str, Any]:
    """What the report says about a finished stage; `meta` as in `conclude`."""
    state, config, settings = stage.state, setup.model.config, setup.settings
    tokens = state.tokens or state.step * settings.total_batch_size
    return dict(
        stage=setup.name,
        plan=setup.plan,
        data=stage.meta["data"],
        device=meta.get("device", setup.hardware.name),  # older checkpoints do not have it
        world=meta.get("world", setup.hardware.world),
        dtype=meta["dtype"],
        compiled=meta.get("compiled", stage.compile),
        parameters=parameter_counts(config),
        steps=state.step,
        tokens=tokens,
        flops=tokens * flops_per_token(config),
        training_seconds=state.seconds,
        tok_per_s=tokens / max(state.seconds, 1e-9),
        last_session_seconds=meta.get("last_session_seconds"),  # unknown to a checkpoint
        train_loss=state.mean_loss,
        skipped_steps=state.skipped,
        documents=state.loader.seen if state.loader else 0,
        documents_left_out=state.loader.left_out if state.loader else 0,
        val_bpb=state.val_bpb,
        val_tokens=state.val_tokens,
        kernels=stage.meta["kernels"],
        peak_memory=meta["peak_memory"],
    )
