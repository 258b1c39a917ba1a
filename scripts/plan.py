"""Decides what speedrun.sh does on this machine, prints it, and writes it down for the shell."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat import checkpoint, fresh
from nanochat import plan as planning
from nanochat.checkpoint import Checkpoint
from nanochat.consensus import from_first_machine
from nanochat.errors import UserError
from nanochat.files import write_atomically
from nanochat.flags import SEEDS, flag, number, parse, path, run_script
from nanochat.one_writer import only_writer
from nanochat.run import TRAINED, Run


@dataclass
class Flags:
    run: str = flag("speedrun", "name of the run: its folder under $NANOCHAT_BASE_DIR/runs")
    data: str | None = path(None, "embedded | hub | a path to your own (default: hub on GPUs with a network)", kind=str)
    depth: int | None = number(None, 1, 1000, "layers of the model (default: by the machine)")
    device: str | None = flag(None, "cuda | cpu | mps (default: the best there is)", kind=str)
    max_minutes: float | None = number(None, 0.01, 1e7, "shorten the training to stay within so many minutes")
    seed: int | None = number(None, *SEEDS, "of the weights and of the embedded data's draw (default: 42)")
    stages: str = flag("all", f"comma-separated, of {', '.join(planning.STAGES)} (all: rl on GPUs with GSM8K only)")
    tune: bool = flag(True, "on a GPU, measure once which kernels pay; --no-tune takes what is known")
    fresh: bool = flag(False, "forget what the stages have done so far (all of them: the plan too)")
    dry_run: bool = flag(False, "print the plan and stop")
    write: str = path("", "file for the shell's variables (speedrun.sh gives it)")
    nodes: int = number(1, 1, 10_000, "machines that train together, of which the first plans (speedrun.sh gives it)")
    node: int = number(0, 0, 10_000, "which of them this is, from 0 (speedrun.sh gives it)")
    head: str = flag("", "address:port where the first tells the others its plan (speedrun.sh gives it)")


def main() -> None:
    flags = parse(Flags, __doc__ or "")
    text = from_first_machine(lambda: here(flags), flags.nodes, flags.node, flags.head)
    if text and flags.write:
        write_atomically(Path(flags.write), os.fsencode(text))


def here(flags: Flags) -> str:
    """Plans, says so, and stores it; returns the shell's variables, "" with --dry-run."""
    stages = list(planning.USUAL) if flags.stages == "all" else [s for s in flags.stages.split(",") if s]
    for stage in stages:
        if stage not in planning.STAGES:
            raise UserError(f"--stages names {stage!r}; the stages are {', '.join(planning.STAGES)}")
    stages = [stage for stage in planning.STAGES if stage in stages]
    if not stages:
        raise UserError(f"--stages is {flags.stages!r} and names none; the stages are {', '.join(planning.STAGES)}")
    if flags.data not in (None, "embedded", "hub") and not Path(flags.data).exists():  # before the speed is measured
        raise UserError(f"--data {flags.data} does not exist; give embedded, hub or a path to your own")
    run = Run.open(flags.run)
    names = ("data", "depth", "device", "max_minutes", "seed")
    asked = {name: value for name in names if (value := getattr(flags, name)) is not None}
    if flags.dry_run:
        decide(flags, run, stages, asked)
        return ""
    with only_writer(run):
        plan, stages = decide(flags, run, stages, asked)
        if everything(flags, stages) and fresh.set_aside(run.folder, lambda place: trained(place, checkpoint.latest)):
            print(f"  note      what run {run.name} has is in {fresh.old(run.folder)} until the first new checkpoint")
        if not planning.path(run).exists():
            planning.store(plan, run)
    return planning.shell(plan, run, stages, flags.fresh, flags.tune)


def everything(flags: Flags, stages: list[str]) -> bool:
    """Whether nothing of the run is to stay."""
    return flags.fresh and set(planning.USUAL) <= set(stages)


def trained(folder: Path, find: Callable[[Path], Checkpoint | None] = checkpoint.to_resume) -> bool:
    """Whether a run has a checkpoint: of any stage, since base's may have been removed when they had served."""
    return any(find(folder / stage) for stage in TRAINED)


def decide(flags: Flags, run: Run, stages: list[str], asked: dict[str, Any]) -> tuple[planning.Plan, list[str]]:
    """(the plan, checked and shown: a stored one, or a new one that is not stored yet; the stages, with its rl)."""
    if not flags.dry_run and not flags.fresh and fresh.put_back(run.folder, trained):
        print(f"note: starting run {run.name} over came to no checkpoint, so what it had before is back")
    stored = None if everything(flags, stages) else planning.load(run, asked)
    plan = stored or planning.make(run, asked, flags.nodes, "rl" in stages)
    if stored:
        planning.on_this_machine(plan, flags.nodes)
    if "rl" in stages and "rl" not in plan.flags:
        raise UserError(
            f"run {run.name!r} was planned without rl, before which SFT sees other conversations; give another --run "
            "NAME, or --fresh to start over"
        )
    if flags.stages == "all" and "rl" in plan.flags:
        stages = list(planning.STAGES)
    planning.spread(plan, flags.nodes)
    planning.check(plan, run, stages)
    planning.show(plan, run, stages)
    return plan, stages


if __name__ == "__main__":
    run_script(main, goes_on=True)
