"""What was decided, as it is stored with the run (plan.json): a second call goes on with the same numbers."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nanochat import records, typed
from nanochat.errors import UserError
from nanochat.gpt import GPTConfig
from nanochat.presets import Flags
from nanochat.run import Run

STAGES = ("tokenizer", "base", "mid", "sft", "rl", "eval", "report")
USUAL = tuple(stage for stage in STAGES if stage != "rl")  # which is in a plan or not: nanochat/rl_size.py
ON_TOKENS = ("base", "mid", "sft")  # stages whose steps are batches of tokens


@dataclass
class Plan:
    """Everything decided. `seconds` by training stage: None where nothing is known."""

    run: str
    asked: dict[str, Any]  # the flags that were given
    device: str
    device_name: str
    gpus: int
    data: str
    reasons: list[str]
    flags: dict[str, Flags]
    config: dict[str, Any]
    batch: int  # tokens per step of base training
    steps: dict[str, int]
    seconds: dict[str, float | None] = field(default_factory=dict)
    rate: float = 0.0  # tokens per second; none in plans of older versions for some GPUs
    measured: bool = False
    disk: int = 0  # bytes
    memory: int = 0  # bytes of one GPU; 0 in plans of older versions
    dtype: str = "bfloat16"  # of the activations
    nodes: int = 1  # machines, of `gpus` each
    evaluation: float = 0.0  # seconds for a sample of CORE and ChatCORE; 0 where neither is asked


def path(run: Run) -> Path:
    return run.folder / "plan.json"


def store(plan: Plan, run: Run) -> None:
    records.write(path(run), asdict(plan))


def load(run: Run, asked: dict[str, Any]) -> Plan | None:
    """The stored plan of a run, or None.

    Raises UserError when it is damaged, or when flags given now differ from those it was made with.
    """
    there = path(run)
    remedy = "put a copy in its place, or delete it and give the first call's flags again"
    content = records.read(there, remedy)
    if content is None:
        return None
    try:
        plan = typed.made(Plan, content)
        typed.made(GPTConfig, plan.config)
        if not set(ON_TOKENS) | {"tokenizer"} <= plan.flags.keys():
            raise TypeError("the flags of a stage are missing")
    except (TypeError, ValueError) as problem:
        raise UserError(f"{there} is damaged: {problem}; {remedy}") from None
    if plan.run != run.name:
        raise UserError(f"{there} is the plan of run {plan.run!r}; {remedy}")
    for key, value in asked.items():
        if plan.asked.get(key) != value:
            before = plan.asked.get(key)
            raise UserError(
                f"run {run.name!r} was planned with --{key.replace('_', '-')} {'unset' if before is None else before}, "
                f"not {value}; give another --run NAME, or --fresh to start over"
            )
    return plan
