"""What `speedrun.sh` trains on which machine: the sizes, as data.

A preset is the flags of each stage. On GPUs with the Hub's data it is nanochat's recipe, of a depth that the memory
allows; gradient accumulation makes up the batch. Everywhere else it is a model of a few million parameters on a small
world.
"""

from dataclasses import dataclass

from nanochat.errors import UserError
from nanochat.recipe import model_config

Flags = dict[str, str | int | float]


@dataclass(frozen=True)
class Preset:
    """Flags by stage; `vocab_size` and the base stage's `depth` decide the model."""

    name: str
    tokenizer: Flags
    base: Flags
    mid: Flags
    sft: Flags


# (GB of one GPU's memory, depth for one GPU, rows at a time). nanochat/cost.py predicts that each fits in 85% of it.
GPU_ROWS = ((80, 20, 16), (48, 16, 16), (24, 12, 16), (16, 12, 8), (8, 8, 4))
EIGHT_GPU_DEPTH, EIGHT_GPU_ROWS = 24, 16  # nanochat's speedrun, for GPUs of 80 GB


def gpu(memory_gb: float, gpus: int, depth: int | None) -> Preset:
    """nanochat's recipe for so many GPUs of this memory. Raises UserError below 8 GB."""
    fitting = [row for row in GPU_ROWS if memory_gb >= 0.93 * row[0]]  # an "80 GB" card reports 79.1 GiB or less
    if not fitting:
        raise UserError(f"the GPU has {memory_gb:.1f} GB of memory; the smallest preset needs 8 (try --device cpu)")
    size, preset_depth, rows = fitting[0]
    if gpus >= 8 and size == 80:
        preset_depth, rows = EIGHT_GPU_DEPTH, EIGHT_GPU_ROWS
    depth = depth or preset_depth
    while depth > preset_depth and rows > 1:  # a deeper model than the preset's: fewer rows at a time
        rows //= 2
        preset_depth = round(preset_depth * 1.25)
    return Preset(
        f"{size} GB",
        tokenizer=dict(vocab_size=32768, max_chars=2_000_000_000),
        base=dict(depth=depth, target_param_data_ratio=8, device_batch_size=rows),
        mid=dict(eval_tokens=2**21),
        sft=dict(eval_tokens=2**21),
    )


SMALL_BATCH = 8192  # tokens of a step: small, so that a short run has steps enough


def small(depth: int | None, hub: bool) -> Preset:
    """A model of 64·depth channels for a CPU, an Apple GPU, or any machine without the Hub."""
    depth = depth or 4
    model_config(depth, 4096, 256, head_dim=64)  # refuses an impossible depth
    rates: Flags = dict(embedding_lr=1.2, unembedding_lr=0.032, matrix_lr=0.08, weight_decay=0.0)
    shape: Flags = dict(depth=depth, head_dim=64, max_seq_len=256, window_pattern="L")
    loop: Flags = dict(
        device_batch_size=32, total_batch_size=SMALL_BATCH, eval_every=100, save_every=50, eval_tokens=2**16
    )
    chat: Flags = dict(eval_every=-1, save_every=25, eval_tokens=2**15)
    return Preset(
        "small",
        tokenizer=dict(vocab_size=4096 if hub else 2048, max_chars=2_000_000),
        base=dict(**shape, **loop, **rates, num_iterations=240),
        mid=dict(chat, num_iterations=160, init_lr_frac=0.5),
        sft=dict(chat, num_iterations=120, init_lr_frac=0.2),  # gently: what SFT does not ask is soon forgotten
    )
