"""What a run needs of the disk."""

import shutil
from pathlib import Path

from nanochat.cadence import checkpoint_bytes
from nanochat.data import hub
from nanochat.errors import UserError
from nanochat.gpt import GPTConfig
from nanochat.plan.record import ON_TOKENS, Plan
from nanochat.run import Run

SHARD = 100_000_000  # bytes


def checkpoints(config: GPTConfig, rl: bool = False) -> int:
    """Bytes of a run's checkpoints, at most: of each stage, two kept and one being written."""
    return (len(ON_TOKENS) + rl) * 3 * checkpoint_bytes(config)


def disk(plan: Plan, config: GPTConfig) -> int:
    """Bytes that the run's artifacts and downloads will take, at most, while a checkpoint is being written."""
    return checkpoints(config, "rl" in plan.flags) + SHARD * shards(plan)


def shards(plan: Plan) -> int:
    """How many shards of text for pretraining are downloaded, beside the one that validates."""
    return hub.shards_for(plan.steps["base"] * plan.batch) if plan.data == "hub" and not hub.mirror() else 0


def need_room(run: Run, size: int, download: int = 0) -> None:
    """Raises UserError when the disk cannot hold a run of `size` bytes, what it has already among them, or the Hub's
    cache, which may be on another disk, so many more.
    """
    place = existing(run.folder)
    cache = existing(hub.cache()) if download else place
    wanted = size - sum(file.stat().st_size for file in run.folder.rglob("*") if file.is_file())
    if place.stat().st_dev == cache.stat().st_dev:
        wanted, download = wanted + download, 0
    for folder, needed, name in ((place, wanted, "NANOCHAT_BASE_DIR"), (cache, download, "HF_HUB_CACHE")):
        if (free := shutil.disk_usage(folder).free) < needed:
            raise UserError(
                f"{folder} has {free / 1e9:.1f} GB free and this run needs about {needed / 1e9:.1f}; free some, or "
                f"put {name} on another disk"
            )


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    while not folder.exists():
        folder = folder.parent
    return folder
