"""Decides what speedrun.sh does on this machine, prints it, and writes it down for the shell."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from nanochat import plan as planning
from nanochat.consensus import from_first_machine
from nanochat.errors import UserError
from nanochat.flags import flag, parse, run_script
from nanochat.run import Run


@dataclass
class Flags:
    run: str = flag("speedrun", "name of the run: its folder under $NANOCHAT_BASE_DIR/runs")
    data: str | None = flag(None, "embedded | hub | a path to your own (default: hub on GPUs with a network)", kind=str)
    depth: int | None = flag(None, "layers of the model (default: by the machine)", kind=int)
    device: str | None = flag(None, "cuda | cpu | mps (default: the best there is)", kind=str)
    max_minutes: float | None = flag(None, "shorten the training to stay within so many minutes", kind=float)
    seed: int | None = flag(None, "of the weights and of the embedded data's draw (default: 42)", kind=int)
    stages: str = flag("all", f"comma-separated, of {', '.join(planning.STAGES)}")
    tune: bool = flag(True, "on a GPU, measure once which kernels pay; --no-tune takes what is known")
    fresh: bool = flag(False, "forget what the stages have done so far (all of them: the plan too)")
    dry_run: bool = flag(False, "print the plan and stop")
    write: str = flag("", "file for the shell's variables (speedrun.sh gives it)")
    nodes: int = flag(1, "machines that train together, of which the first plans (speedrun.sh gives it)")
    node: int = flag(0, "which of them this is, from 0 (speedrun.sh gives it)")
    head: str = flag("", "address:port where the first tells the others its plan (speedrun.sh gives it)")


def main() -> None:
    flags = parse(Flags, __doc__ or "")
    text = from_first_machine(lambda: here(flags), flags.nodes, flags.node, flags.head)
    if text and flags.write:
        Path(flags.write).write_text(text)


def here(flags: Flags) -> str:
    """Plans, says so, and stores it; returns the shell's variables, "" with --dry-run."""
    stages = list(planning.STAGES) if flags.stages == "all" else [s for s in flags.stages.split(",") if s]
    for stage in stages:
        if stage not in planning.STAGES:
            raise UserError(f"--stages names {stage!r}; the stages are {', '.join(planning.STAGES)}")
    stages = [stage for stage in planning.STAGES if stage in stages]
    run = Run.open(flags.run)
    names = ("data", "depth", "device", "max_minutes", "seed")
    asked = {name: value for name in names if (value := getattr(flags, name)) is not None}
    everything = flags.fresh and stages == list(planning.STAGES)
    stored = None if everything else planning.load(run, asked)
    plan = stored or planning.make(run, asked, flags.nodes)
    planning.spread(plan, flags.nodes)
    planning.check(plan, run, stages)
    planning.show(plan, run, stages)
    if flags.dry_run:
        return ""
    if everything:
        shutil.rmtree(run.folder, ignore_errors=True)
    if everything or stored is None:
        planning.store(plan, run)
    return planning.shell(plan, run, stages, flags.fresh, flags.tune)


if __name__ == "__main__":
    run_script(main)
