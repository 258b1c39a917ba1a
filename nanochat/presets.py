"""What `speedrun.sh` trains on which machine: the sizes, as data.

A preset is the flags of each stage. On GPUs with the Hub's data it is nanochat's recipe, of a depth that the memory
allows; gradient accumulation makes up the batch. Everywhere else it is a model of a few million parameters on a small
world.
"""

from dataclasses import dataclass

from nanochat.cost import training_memory
from nanochat.errors import UserError
from nanochat.gpt import GPTConfig
from nanochat.recipe import horizon, model_config

Flags = dict[str, str | int | float]


@dataclass(frozen=True)
class Preset:
    """Flags by stage; `vocab_size` and the base stage's `depth` decide the model."""

    name: str
    tokenizer: Flags
    base: Flags
    mid: Flags
    sft: Flags

    def config(self) -> GPTConfig:
        """The model's."""
        sizes = {key: self.base[key] for key in ("max_seq_len", "head_dim", "window_pattern") if key in self.base}
        return model_config(int(self.base["depth"]), int(self.tokenizer["vocab_size"]), **sizes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Size:
    """Depth and rows at a time for cards that report `memory` GiB (torch's total_memory: less than the name says).

    `eight`: depth and rows on eight of them. It is nanochat's speedrun, of depth 24, wherever that fits.
    """

    memory: float
    cards: str
    depth: int
    rows: int
    eight: tuple[int, int]


SIZES = (
    Size(191.5, "MI300X; MI325X and B300 have more", 20, 64, (24, 32)),
    Size(178.0, "B200", 20, 64, (24, 32)),
    Size(139.5, "H200", 20, 64, (24, 32)),
    Size(79.1, "H100, A100-80; GH200, H100 NVL and RTX PRO 6000 have more", 20, 32, (24, 16)),
    Size(44.4, "L40S, A40, RTX A6000, RTX 6000 Ada", 16, 16, (24, 8)),
    Size(39.4, "A100-40", 16, 16, (24, 8)),
    Size(31.4, "RTX 5090, V100-32", 16, 16, (20, 8)),
    Size(23.5, "RTX 3090, RTX 4090", 12, 16, (16, 8)),
    Size(22.0, "L4, A10G", 12, 16, (16, 8)),
    Size(15.6, "cards of 16 GB", 12, 16, (12, 16)),
    Size(14.6, "T4", 12, 8, (12, 8)),
    Size(11.6, "cards of 12 GB", 12, 8, (12, 8)),
    Size(7.6, "cards of 8 GB", 8, 8, (8, 8)),
)
SPREAD = 0.97  # of a size's memory is enough for it: drivers and displays keep a little more or less
SHARE = 0.9  # of a card's memory that a step is planned to take, as predicted
RATIO = 8  # tokens of base training per scaling parameter, nanochat's speedrun


def gpu(memory: float, gpus: int, depth: int | None, dtype: str = "bfloat16") -> Preset:
    """nanochat's recipe for so many GPUs of `memory` GiB each, computing in `dtype`.

    Fewer rows at a time than a size has where a deeper model takes more memory, or where all GPUs together would take
    more than a step of a smaller one. Raises UserError below 8 GB, and for a depth that is predicted not to fit with a
    single row.
    """
    size = next((size for size in SIZES if memory >= SPREAD * size.memory), None)
    if size is None:
        raise UserError(f"the GPU has {memory:.1f} GiB of memory; the smallest preset needs 7.6 (try --device cpu)")
    usual, rows = size.eight if gpus >= 8 else (size.depth, size.rows)
    config = model_config(depth or usual, 32768)
    batch = horizon(config, 0.0, RATIO).total_batch_size
    shared = lambda: batch % (rows * config.sequence_len * gpus) == 0
    rows = rows_that_fit(config, rows, gpus, dtype, memory)
    while rows > 1 and not shared():
        rows //= 2
    if (needed := predicted(config, rows, gpus, dtype)) > memory:
        raise UserError(
            f"--depth {config.n_layer} needs {needed:.1f} GiB a GPU for a single row, as predicted, of {memory:.1f}; "
            "take a smaller depth"
        )
    return Preset(
        f"{size.memory:g} GiB",
        tokenizer=dict(vocab_size=config.vocab_size, max_chars=2_000_000_000),
        base=dict(depth=config.n_layer, target_param_data_ratio=RATIO, device_batch_size=rows),
        mid=dict(eval_tokens=2**21),
        sft=dict(eval_tokens=2**21),
    )


def rows_that_fit(config: GPTConfig, rows: int, gpus: int, dtype: str, memory: float) -> int:
    """Rows at a time, halved until they are predicted to fit in SHARE of so many GiB a GPU; at least 1."""
    while rows > 1 and predicted(config, rows, gpus, dtype) >= SHARE * memory:
        rows //= 2
    return rows


def memory(config: GPTConfig, rows: int, gpus: int, dtype: str, kernels: str = "auto") -> dict[str, int]:
    """Predicted bytes of one GPU, by part, for a step of so many rows at a time. kernels: as training_memory's."""
    # Where there is no bfloat16, our kernels do not run either, unless they were measured.
    kernels = kernels if dtype == "bfloat16" else "torch"
    return training_memory(config, rows * config.sequence_len, gpus, dtype, kernels=kernels)


def predicted(config: GPTConfig, rows: int, gpus: int, dtype: str = "bfloat16", kernels: str = "auto") -> float:
    """The same in all, in GiB."""
    return sum(memory(config, rows, gpus, dtype, kernels).values()) / 2**30


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
