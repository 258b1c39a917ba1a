"""What a run needs of the disk."""

import shutil

from nanochat.cadence import checkpoint_bytes
from nanochat.data import hub
from nanochat.errors import UserError
from nanochat.gpt import GPTConfig
from nanochat.plan.record import ON_TOKENS, Plan
from nanochat.run import Run


def checkpoints(config: GPTConfig, stages: int = len(ON_TOKENS)) -> int:
    """Bytes of a run's checkpoints, at most: of each stage, two kept and one being written."""
    return stages * 3 * checkpoint_bytes(config)


def disk(plan: Plan, config: GPTConfig) -> int:
    """Bytes that the run's artifacts and downloads will take, at most, while a checkpoint is being written."""
    total = checkpoints(config, len(ON_TOKENS) + ("rl" in plan.flags))
    if plan.data == "hub" and not hub.mirror():
        total += hub.shards_for(plan.steps["base"] * plan.batch) * 100_000_000
    return total


def need_room(run: Run, size: int) -> None:
    """Raises UserError when the disk cannot hold a run of so many bytes, what it has already among them."""
    folder = run.folder
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    has = sum(file.stat().st_size for file in run.folder.rglob("*") if file.is_file())
    if free + has < size:
        raise UserError(
            f"{folder} has {free / 1e9:.1f} GB free and this run needs about {(size - has) / 1e9:.1f}; free some, or "
            "put NANOCHAT_BASE_DIR on another disk"
        )
