"""What is to be compiled: handed to a child process as JSON. Look at `Case`."""

from dataclasses import dataclass
from typing import Any

PLAIN = "plain"  # in place of a setting of our kernels: plain.py's step
PARTS = ("step", "decode", "prefill")


@dataclass(frozen=True)
class Case:
    """What is run: `config` as GPTConfig's fields. fp8: "", "current" or "delayed"; kernels as NANOCHAT_KERNELS, or
    PLAIN; part: of PARTS.
    """

    config: dict[str, Any]
    rows: int  # of a micro-batch; running requests
    dtype: str = "bfloat16"
    fp8: str = ""
    kernels: str = "auto"
    optimizer: bool = True  # whether its updates are compiled and made too
    part: str = "step"
    gpus: int = 1  # ranks of a training step
    device: str = "cuda"
    without: str = ""  # of fixes.FIXES: what of the step is taken back
