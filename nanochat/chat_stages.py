"""Mid-training and SFT: the same loop on conversations, from the model of the stage before.

mid: whole conversations packed into full rows, every token learnt, learning rate falling over the last fifth.
sft: rows padded, only the assistant's tokens learnt, learning rate falling over the last half.
Both start at the learning rates of base training, with its optimizer moments still warm, and without weight decay.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from nanochat import complete, fresh
from nanochat.cadence import EVERY, TOKENS
from nanochat.checkpoint import same_version
from nanochat.consensus import same_checkpoint
from nanochat.data import choose
from nanochat.data.loader import Encode, conversation_encoder
from nanochat.data.packing import learnable
from nanochat.data.source import Source, first_items
from nanochat.errors import UserError
from nanochat.flags import MANY, SEEDS, flag, number, path
from nanochat.hardware import Hardware
from nanochat.hardware import setup as look_at_hardware
from nanochat.one_writer import only_writer
from nanochat.ranks import first_alone
from nanochat.recipe import Schedule
from nanochat.run import Run
from nanochat.stages import SCALINGS, Setup, run_stage, say, set_fp8
from nanochat.trainer import Settings, Stage

PROMPTS = [
    [dict(role="user", content=question)]
    for question in ("Hello!", "Who are you?", "What is the capital of France?", "What is 12 + 34?")
]


@dataclass
class ChatFlags:
    """Flags of mid_train and chat_sft; sizes not given are the base model's."""

    run: str = flag("speedrun", "name of the run: its folder under $NANOCHAT_BASE_DIR/runs", "--model-tag", "-g")
    data: str = path("embedded", "embedded | hub | a path to JSONL conversations")
    device_type: str = flag("", "cuda | cpu | mps (default: the best there is)")
    compile: str = flag("auto", "auto: torch.compile where it works; no: eager", choices=("auto", "no"))
    fp8: bool = flag(False, "multiply in fp8 (H100 and newer; emulated, and slowly, elsewhere)")
    fp8_scaling: str = flag("current", "fp8's scales: of each tensor itself, or of its last 16", choices=SCALINGS)
    fresh: bool = flag(False, "forget what this stage has trained so far")
    tune: bool = flag(True, "on a GPU, measure once which kernels pay (about 3 minutes), where it is not known")
    spike_guard: bool = flag(True, "skip a step whose loss is 6 standard deviations above the last 128")
    wandb: bool = flag(False, "also log to Weights & Biases (pip install wandb)")
    profile: int = number(0, 0, 10_000, "record so many steps, once it is warm, to <run>/<stage>/profile/ (0: none)")
    source: str = flag("", "stage to start from (default: mid for sft where there is one, else base)", "-i")
    load_optimizer: bool = flag(True, "start with the optimizer's moments of the stage before")
    num_iterations: int = number(-1, 1, MANY, "optimizer steps (-1: one epoch, by the first 1,000 conversations)")
    max_iterations: int = number(-1, 1, MANY, "of that epoch, at most so many steps (-1: all)")
    max_seq_len: int = number(-1, 2, 1 << 20, "tokens of a row (-1: as in base training)")
    device_batch_size: int = number(-1, 1, 1 << 16, "rows per device at a time (-1: as in base training)")
    total_batch_size: int = number(-1, 1, MANY, "tokens per optimizer step (-1: as in base training)")
    init_lr_frac: float = number(0.8, 0.0, 1e3, "learning rates at the start, as a fraction of base training's")
    warmdown_ratio: float = number(0.5, 0.0, 1.0, "last part of the stage in which the learning rate falls")
    final_lr_frac: float = number(0.0, 0.0, 1.0, "learning rate at the end, as a fraction")
    eval_every: int = number(EVERY["mid"], 1, MANY, "validate every so many steps (-1: only at the end)", also=-1)
    eval_tokens: int = number(TOKENS["mid"], 1, MANY, "tokens to validate on at the end (at most the whole split)")
    eval_tokens_between: int = number(-1, 1, MANY, "tokens of those before (-1: as many; on a GPU a sixteenth)")
    sample_every: int = number(-1, 1, MANY, "show answers every so many steps (-1: only at the end)")
    save_every: int = number(-1, 1, MANY, "checkpoint every so many steps (-1: with each validation)")
    seed: int = number(42, *SEEDS, "of the draw of the embedded conversations")
    word_problems: int = number(0, 0, 100, "percent of word problems on top of the embedded ones: for chat_rl")


def run_chat_stage(name: str, flags: ChatFlags, watch: Callable[[Stage], Callable[[], None]] | None = None) -> None:
    """Trains stage "mid" or "sft" as the flags say. `watch`: as in Setup."""
    hardware = look_at_hardware(flags.device_type)
    run = Run.open(flags.run)
    with only_writer(run, hardware):
        _train(name, flags, run, hardware, watch)


def _train(
    name: str, flags: ChatFlags, run: Run, hardware: Hardware, watch: Callable[[Stage], Callable[[], None]] | None
) -> None:
    tokenizer = run.tokenizer()
    before = flags.source or _stage_before(run, name)
    parent = same_checkpoint(lambda: run.checkpoint(before))
    parent.check_tokenizer(tokenizer)
    chosen = lambda: choose.conversations(flags.data, name, flags.seed, before, flags.word_problems)
    source, left_out = first_alone(chosen, hardware)
    masked = name == "sft"
    encode = conversation_encoder(tokenizer, masked)
    with same_version(parent.folder):
        base = parent.meta["settings"]
        settings = Settings(
            flags.num_iterations,
            flags.device_batch_size if flags.device_batch_size > 0 else base["device_batch_size"],
            flags.max_seq_len if flags.max_seq_len > 0 else base["max_seq_len"],
            flags.total_batch_size if flags.total_batch_size > 0 else base["total_batch_size"],
            flags.eval_every,
            flags.save_every,
            flags.sample_every,
        )
    settings.accumulation(hardware.world)
    if settings.num_iterations <= 0:
        epoch, most = epoch_steps(source, encode, settings), flags.max_iterations
        settings = replace(settings, num_iterations=min(epoch, most) if most > 0 else epoch)
    torch.manual_seed(flags.seed)  # nothing draws from it, but its state is in the checkpoint
    model = parent.model(hardware.device, hardware.dtype)
    if settings.max_seq_len > model.config.sequence_len:
        raise UserError(
            f"--max-seq-len {settings.max_seq_len} is more than the {model.config.sequence_len} of the base model"
        )
    with same_version(parent.folder):
        rates = {key: value * flags.init_lr_frac for key, value in parent.meta["rates"].items()}
        optimizer = model.setup_optimizer(**rates, weight_decay=0.0)
        if warm := flags.load_optimizer and "optimizer" in complete.parts(parent.meta):
            optimizer.load_full_state(parent.tensors("optimizer"))
    if not warm and flags.load_optimizer:  # an imported model may have none
        left_out.append(f"the {before} model came without the optimizer's moments: new ones")
    schedule = Schedule(
        settings.num_iterations, 0, flags.warmdown_ratio, flags.final_lr_frac, momentum_peak=0.95, momentum_end=0.95
    )
    plan = dict(
        vars(schedule),
        total_batch_size=settings.total_batch_size,
        max_seq_len=settings.max_seq_len,
        load_optimizer=flags.load_optimizer,
        parent=parent.fingerprint,
        **rates,
        **set_fp8(model, hardware, settings, flags.fp8, flags.fp8_scaling),
    )
    setup = Setup(
        name=name,
        run=run,
        hardware=hardware,
        tokenizer=tokenizer,
        source=source,
        encode=encode,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        settings=settings,
        rates=parent.meta["rates"],
        plan=plan,
        eval_tokens=flags.eval_tokens,
        eval_tokens_between=flags.eval_tokens_between,
        prompts=PROMPTS,
        compile=flags.compile,
        pad=masked,
        wandb=flags.wandb,
        tune=flags.tune,
        spike_guard=flags.spike_guard,
        watch=watch,
        fresh=flags.fresh,
    )
    for sentence in left_out:
        say(setup, f"{name}: {sentence}")
    run_stage(setup)


def _stage_before(run: Run, name: str) -> str:
    mid = run.stage("mid")
    return "mid" if name == "sft" and (mid.is_dir() or fresh.old(mid).is_dir()) else "base"


def epoch_steps(source: Source, encode: Encode, settings: Settings) -> int:
    """Optimizer steps of one epoch, from the mean length of the first conversations."""
    capacity = settings.max_seq_len + 1
    first = encode(first_items(source, "train", 1000))
    mean = sum(min(len(document), capacity) for document in first if learnable(document, capacity)) / len(first)
    last = source.units("train") - 1  # the units before it are all of one length
    items = last * len(source.load("train", 0)) + len(source.load("train", last))
    return max(1, round(items * mean / settings.total_batch_size))
