"""Which rank of how many this process is, by a launcher's variables (torchrun, scripts.launch), and meeting the others.

What a launcher leaves behind in a shell, or what is set by hand, may fit nothing. That is said before anybody waits.
"""

import os
import threading
from datetime import timedelta

import torch
import torch.distributed as dist

from nanochat.errors import UserError, is_number

# How long a rank waits for another before it gives up: rank 0 may be compiling, measuring or writing a checkpoint
# meanwhile, each of which takes minutes, and torch's default for NCCL is ten.
PATIENCE = timedelta(minutes=30)
TO_BE_SAID = 20.0  # seconds after which a rank that waits says for whom
DEFAULTS = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
ALONE = "a launcher sets it (torchrun, scripts.launch); for one process: unset RANK LOCAL_RANK WORLD_SIZE"


def place() -> tuple[int, int, int]:
    """(rank, rank on this machine, number of ranks). Raises UserError for variables that no launcher sets so."""
    rank, local_rank, world = (_number(name, os.environ.get(name, default)) for name, default in DEFAULTS.items())
    for name, value in dict(RANK=rank, LOCAL_RANK=local_rank).items():
        if value >= world:
            raise UserError(f"{name} is {value} and WORLD_SIZE {world}, wanted a rank below their number; {ALONE}")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if world > 1 else ():
        if not os.environ.get(name):
            raise UserError(f"WORLD_SIZE is {world}, but {name} is not set; {ALONE}")
    if world > 1 and _number("MASTER_PORT", os.environ["MASTER_PORT"]) > 65535:
        raise UserError(f"MASTER_PORT is {os.environ['MASTER_PORT']}, wanted at most 65535; {ALONE}")
    return rank, local_rank, world


def _number(name: str, value: str) -> int:
    if not is_number(value):
        raise UserError(f"{name} is {value!r}, wanted a whole number; {ALONE}")
    return int(value)


def meet(backend: str, device: torch.device | None, rank: int, world: int) -> None:
    """Joins the process group, and says for whom it waits when that takes long. Raises UserError where nobody comes,
    or NCCL does not start."""
    at = f"MASTER_ADDR {os.environ['MASTER_ADDR']}, MASTER_PORT {os.environ['MASTER_PORT']}"
    waiting = f"note: rank {rank} waits for the others of WORLD_SIZE {world} at {at}; {ALONE}"
    said = threading.Timer(TO_BE_SAID, print, [waiting], dict(flush=True))
    said.daemon = True
    said.start()
    try:
        dist.init_process_group(backend, timeout=PATIENCE, device_id=device)
    except (dist.DistNetworkError, dist.DistStoreError) as problem:
        why = str(problem).splitlines()[0]
        raise UserError(f"rank {rank} of {world} cannot meet the others at {at}: {why}; {ALONE}") from None
    except dist.DistBackendError as problem:  # with a device, NCCL starts here already
        why = next((line for line in reversed(str(problem).splitlines()) if line.strip()), "")
        raise UserError(
            f"rank {rank} of {world}: NCCL could not start: {why}; NCCL_DEBUG=INFO says more; in docker: --ipc=host "
            "(or --shm-size)"
        ) from None
    finally:
        said.cancel()
