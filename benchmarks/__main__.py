"""Every op and the training step on this machine, in one command; and two results side by side.

    python -m benchmarks run --profile quick --out results/mine.json     # also writes mine.md and mine.html
    python -m benchmarks compare before.json after.json

Without --profile: quick on a GPU (planned for 8 minutes), smoke on a CPU (a minute, to see that it works).
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import compare, ops, pages, profiles, training_step
from benchmarks.contenders import CONTENDERS
from benchmarks.environment import environment
from kernels import OPS, dispatch
from nanochat.errors import UserError
from nanochat.files import write_atomically
from nanochat.flags import flag, number, parse, path, run_script
from nanochat.hardware import has_gpu, pick, set_allocator, setup, try_allocator
from nanochat.render import markdown, page
from profiling.nvml import Sampler

STOPPED = "stopped: what was measured before is written"
LEAST_SECONDS = 0.1  # for the turns of an op when the run is late


@dataclass
class Flags:
    profile: str = flag("", "smoke, quick or full (default: quick on a GPU, smoke on a CPU)")
    op: str = flag("", "only these ops, comma-separated, and no training step")
    minutes: float = number(0.0, 0.01, 1e5, "plan for so many, with fewer or more repeats (0: the profile's own)")
    out: str = path("benchmarks.json", "where the result goes; the tables and the page are written beside it")


def measured(flags: Flags, profile: profiles.Profile) -> dict[str, Any]:
    """Everything the profile wants, as JSON-ready data."""
    started, machine, where = time.perf_counter(), profiles.machine(), environment()
    wanted = profiles.benches(flags.op.split(",") if flags.op else list(OPS), profile)
    of_training = profile.training * 60 * profile.minutes if not flags.op else 0.0
    ends = started + 60 * profile.minutes - of_training
    each = (ends - started) / len(wanted)
    print(f"{len(wanted)} times an op at a case, {each:.1f} s each on average; what is late costs repeats, no op")
    rows: list[dict[str, Any]] = []
    stopped = False
    for i, bench in enumerate(wanted):
        begun = time.perf_counter()
        until = begun + max(ends - begun, 0.0) / (len(wanted) - i)  # what is left, shared by those that are left
        seconds: Callable[[], float] = lambda until=until: max(LEAST_SECONDS, until - time.perf_counter())  # type: ignore
        contenders = CONTENDERS[bench.op.name]
        try:
            rows += ops.measure(bench, contenders, machine, seconds, profile.most)
        except Exception as problem:  # out of memory, say: what was measured before is not lost with it
            rows += ops.failed(bench, contenders, machine, problem)
        except dispatch.Lost as problem:  # nothing runs after that
            print(f"{problem}; {STOPPED}")
            rows += ops.failed(bench, contenders, machine, problem)
            stopped = True
            break
        except KeyboardInterrupt:
            print(STOPPED)
            stopped = True
            break
        print(
            f"{i + 1:3}/{len(wanted)} {bench.op.name} {bench.setting} {bench.case}: {progress_line(rows, bench)}",
            flush=True,
        )
    training = None
    if of_training and not stopped:
        try:
            training = training_step.run(training_step.Flags(minutes=of_training / 60), setup())
        except (Exception, dispatch.Lost) as problem:
            training = dict(status="failed", why=ops.sentence(problem), rows=[])
        except KeyboardInterrupt:
            print(STOPPED)
            stopped = True
        if training:
            print("\n".join(training_step.lines(training)))
    limits = dict(flops=machine.flops, fp8_flops=machine.fp8_flops, bandwidth=machine.bandwidth)
    return dict(
        format=compare.FORMAT, profile=flags.profile, minutes=profile.minutes, environment=where, limits=limits,
        training=training, seconds=time.perf_counter() - started, stopped=stopped, rows=rows,
    )  # fmt: skip


def progress_line(rows: list[dict[str, Any]], bench: ops.Bench) -> str:
    """One line of progress: the last way's medians, and who failed."""
    mine = [
        row for row in rows if (row["op"], row["setting"], row["case"]) == (bench.op.name, bench.setting, bench.case)
    ]
    last = [row for row in mine if row["way"] == mine[-1]["way"]]
    parts = [f"{row['contender']} {row['median_ms']:.3g}" for row in last if row["status"] == "timed"]
    parts += [f"{row['contender']} FAILED ({row['why']})" for row in last if row["status"] == "failed"]
    return f"{mine[-1]['way']}, ms: {', '.join(parts)}"


def run() -> None:
    flags = parse(Flags, __doc__ or "", sys.argv[2:])
    expands = set_allocator()  # as a training has it: before CUDA starts
    usable = flags.profile != "smoke" and pick("", 0) == "cuda"  # raises where torch cannot use a card
    if expands and has_gpu():  # also with smoke, which then runs on the card
        try_allocator(torch.device("cuda", 0), 0)
    flags.profile = flags.profile or ("quick" if usable else "smoke")
    if flags.profile not in profiles.PROFILES:
        raise UserError(f"--profile is {flags.profile!r}, wanted one of {', '.join(profiles.PROFILES)}")
    if flags.profile != "smoke" and not usable:
        raise UserError(
            f"--profile {flags.profile} has shapes for a GPU, and torch sees none here; smoke runs on a CPU"
        )
    profile = profiles.PROFILES[flags.profile]
    profile = replace(profile, minutes=flags.minutes or profile.minutes)
    out = Path(flags.out)
    if out.suffix != ".json" or not out.parent.is_dir():
        raise UserError(f"--out is {flags.out!r}, wanted a name ending in .json, in a folder that is there")
    beside = [out.with_suffix(".md"), out.with_suffix(".html")]
    if not out.exists() and (others := [one for one in beside if os.path.lexists(one)]):
        raise UserError(f"--out is {flags.out!r}, but {others[0]} would be written over; take another name")
    with Sampler(interval=0.5) as sampler:
        result = measured(flags, profile)
    result["sensors"] = sampler.summary()
    write_atomically(out, (json.dumps(result, allow_nan=False) + "\n").encode())
    title = f"Benchmarks on {result['environment']['machine']}"
    sections = pages.sections(result)
    for one, made in zip(beside, (markdown, page)):
        write_atomically(one, made(title, sections).encode())
    counts = {name: sum(row["status"] == name for row in result["rows"]) for name in ("timed", "failed", "skipped")}
    print(f"Written: {out}, {beside[0]}, {beside[1]}")
    print(json.dumps(dict(out=str(out), profile=flags.profile, seconds=result["seconds"], **counts)))
    if result["stopped"]:
        sys.exit(130)


def main() -> None:
    words = sys.argv[1:]
    if words[:1] == ["run"]:
        run()
    elif words[:1] == ["compare"] and len(words) == 3 and "-h" not in words and "--help" not in words:
        print(json.dumps(compare.report(*words[1:])))
    elif words in ([], ["-h"], ["--help"]):
        print(__doc__ or "")
    else:
        raise UserError("wanted: python -m benchmarks run [--profile …], or compare BEFORE.json AFTER.json")


if __name__ == "__main__":
    run_script(main, goes_on=True)
