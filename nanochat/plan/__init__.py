"""The plan of a speedrun: looks at machine and network, picks a preset, says what it will do and how long it takes.

The decisions are stored with the run (plan.json), so that a second call goes on with the same numbers whatever has
changed. Times on CPUs and Apple GPUs come from a few real steps run just before; on other GPUs they are predicted, and
say so.
"""

from nanochat.plan.command import shell
from nanochat.plan.decide import check, make, on_this_machine, spread
from nanochat.plan.page import show
from nanochat.plan.record import STAGES, USUAL, Plan, load, path, store

__all__ = [
    "STAGES",
    "USUAL",
    "Plan",
    "check",
    "load",
    "make",
    "on_this_machine",
    "path",
    "shell",
    "show",
    "spread",
    "store",
]
