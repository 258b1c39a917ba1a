"""Pretraining: from random weights to a model that continues text."""

from dataclasses import dataclass

import torch

from nanochat.cadence import EVERY, TOKENS
from nanochat.data import choose
from nanochat.data.loader import document_encoder
from nanochat.flags import MANY, SEEDS, flag, number, parse, path, run_script
from nanochat.gpt import GPT
from nanochat.hardware import Hardware
from nanochat.hardware import setup as look_at_hardware
from nanochat.one_writer import only_writer
from nanochat.recipe import RATES, WEIGHT_DECAY, Schedule, horizon, model_config
from nanochat.run import Run
from nanochat.stages import SCALINGS, Setup, run_stage, set_fp8
from nanochat.trainer import Settings

PROMPTS = [
    "The capital of France is",
    "The opposite of hot is",
    "If yesterday was Friday, then tomorrow will be",
    "My favorite color is",
]


@dataclass
class Flags:
    run: str = flag("speedrun", "name of the run: its folder under $NANOCHAT_BASE_DIR/runs", "--model-tag", "-g")
    data: str = path("embedded", "embedded | hub | a path to parquet, JSONL or text files")
    device_type: str = flag("", "cuda | cpu | mps (default: the best there is)")
    compile: str = flag("auto", "auto: torch.compile where it works; no: eager", choices=("auto", "no"))
    fp8: bool = flag(False, "multiply in fp8 (H100 and newer; emulated, and slowly, elsewhere)")
    fp8_scaling: str = flag("current", "fp8's scales: of each tensor itself, or of its last 16", choices=SCALINGS)
    fresh: bool = flag(False, "forget what this stage has trained so far")
    tune: bool = flag(True, "on a GPU, measure once which kernels pay (about 3 minutes), where it is not known")
    spike_guard: bool = flag(True, "skip a step whose loss is 6 standard deviations above the last 128")
    wandb: bool = flag(False, "also log to Weights & Biases (pip install wandb)")
    profile: int = number(0, 0, 10_000, "record so many steps, once it is warm, to <run>/base/profile/ (0: none)")
    depth: int = number(20, 1, 1000, "layers of the model; with the recipe, everything follows from it")
    aspect_ratio: int = number(64, 1, 1 << 16, "width = depth * aspect_ratio, rounded up to whole heads")
    head_dim: int = number(128, 1, 1024, "channels of an attention head")
    max_seq_len: int = number(2048, 2, 1 << 20, "tokens of context")
    window_pattern: str = flag("SSSL", "attention windows tiled over the layers: L full, S a quarter")
    num_iterations: int = number(-1, 1, MANY, "optimizer steps (-1: from the next flags)")
    target_flops: float = number(-1.0, 1.0, 1e30, "train for so many FLOPs (-1: off)")
    target_param_data_ratio: float = number(12.0, 0.001, 1e6, "train for so many tokens per parameter")
    device_batch_size: int = number(32, 1, 1 << 16, "rows per device at a time; lower it when memory runs out")
    total_batch_size: int = number(-1, 1, MANY, "tokens per optimizer step (-1: from the recipe)")
    embedding_lr: float = number(RATES["embedding_lr"], 0.0, 1e3, "learning rate of the embeddings (AdamW)")
    unembedding_lr: float = number(RATES["unembedding_lr"], 0.0, 1e3, "learning rate of the head (AdamW)")
    matrix_lr: float = number(RATES["matrix_lr"], 0.0, 1e3, "learning rate of the matrices (Muon)")
    scalar_lr: float = number(RATES["scalar_lr"], 0.0, 1e3, "learning rate of the per-layer scalars (AdamW)")
    weight_decay: float = number(WEIGHT_DECAY, 0.0, 1e3, "Muon's weight decay at depth 12")
    warmup_steps: int = number(40, 0, MANY, "steps of learning-rate warm-up (at most a twentieth of the run)")
    warmdown_ratio: float = number(0.65, 0.0, 1.0, "last part of the run in which the learning rate falls")
    final_lr_frac: float = number(0.05, 0.0, 1.0, "learning rate at the end, as a fraction")
    eval_every: int = number(EVERY["base"], 1, MANY, "validate every so many steps (-1: only at the end)", also=-1)
    eval_tokens: int = number(TOKENS["base"], 1, MANY, "tokens to validate on at the end (at most the whole split)")
    eval_tokens_between: int = number(-1, 1, MANY, "tokens of those before (-1: as many; on a GPU a sixteenth)")
    sample_every: int = number(2000, 1, MANY, "show samples every so many steps (-1: only at the end)", also=-1)
    save_every: int = number(-1, 1, MANY, "checkpoint every so many steps (-1: with each validation)")
    seed: int = number(42, *SEEDS, "of the initial weights, and of the draw of the embedded data")


def main() -> None:
    flags = parse(Flags, __doc__ or "")
    hardware = look_at_hardware(flags.device_type)
    run = Run.open(flags.run)
    with only_writer(run, hardware):
        train(flags, run, hardware)


def train(flags: Flags, run: Run, hardware: Hardware) -> None:
    from profiling.recorded.record import watcher

    tokenizer = run.tokenizer()
    config = model_config(
        flags.depth, tokenizer.vocab_size, flags.max_seq_len, flags.aspect_ratio, flags.head_dim, flags.window_pattern
    )
    length = horizon(
        config, flags.weight_decay, flags.target_param_data_ratio, flags.num_iterations, flags.target_flops,
        flags.total_batch_size,
    )  # fmt: skip
    settings = Settings(
        length.num_iterations, flags.device_batch_size, flags.max_seq_len, length.total_batch_size, flags.eval_every,
        flags.save_every, flags.sample_every,
    )  # fmt: skip
    settings.accumulation(hardware.world)
    source = choose.documents(flags.data, length.num_iterations * length.total_batch_size, flags.seed)
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=hardware.device)
    torch.manual_seed(flags.seed)
    model.init_weights(hardware.dtype)
    precision = set_fp8(model, hardware, settings, flags.fp8, flags.fp8_scaling)
    rates = dict(
        embedding_lr=flags.embedding_lr * length.lr_scale,
        unembedding_lr=flags.unembedding_lr * length.lr_scale,
        matrix_lr=flags.matrix_lr * length.lr_scale,
        scalar_lr=flags.scalar_lr * length.lr_scale,
    )
    schedule = Schedule(length.num_iterations, flags.warmup_steps, flags.warmdown_ratio, flags.final_lr_frac)
    decisive = dict(
        vars(schedule), total_batch_size=length.total_batch_size, weight_decay=length.weight_decay, seed=flags.seed
    )
    run_stage(
        Setup(
            name="base",
            run=run,
            hardware=hardware,
            tokenizer=tokenizer,
            source=source,
            encode=document_encoder(tokenizer),
            model=model,
            optimizer=model.setup_optimizer(**rates, weight_decay=length.weight_decay),
            schedule=schedule,
            settings=settings,
            rates=rates,
            plan=dict(decisive, **rates, config=vars(config), **precision),
            eval_tokens=flags.eval_tokens,
            eval_tokens_between=flags.eval_tokens_between,
            prompts=PROMPTS,
            compile=flags.compile,
            wandb=flags.wandb,
            tune=flags.tune,
            spike_guard=flags.spike_guard,
            watch=watcher(flags.profile),
            fresh=flags.fresh,
        )
    )


if __name__ == "__main__":
    run_script(main, goes_on=True)
