"""This code beside an earlier commit of it, on this machine and in turns: did a change make anything slower?

    python -m benchmarks.vs_commit                      # beside the last commit
    python -m benchmarks.vs_commit --commit v1.0 --what train --rounds 20

The commit's files are unpacked into a folder that is removed afterwards. Both have two processes each, started in the
order ours, before, before, ours, with the same weights and the same tokens; all take turns, and who comes first changes
from round to round. A ratio is of one round's sums; reported are the median of all rounds' and, as a machine drifts,
the quarters around it. Losses are compared bit by bit. The measuring itself is this code's on both sides.

Processes of one code can differ by more than a change does (of four that trained on 2 cores of an Intel Xeon, by up to
20%): how far apart the two of a side were is said beside the ratio, and a ratio nearer to 1 than that shows no
difference.
"""

import io
import json
import statistics
import subprocess
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.neighbour import WORKERS
from benchmarks.our_step import drawn_weights
from benchmarks.worker import settings, sizes
from nanochat.errors import UserError
from nanochat.flags import flag, listed, number, parse, run_script
from nanochat.hardware import device_name
from nanochat.progress import Count
from nanochat.turns import end, measure, mirrored, start

ROOT = Path(__file__).parent.parent
WHAT = ("train", "evaluate", "decode")
WARM = 3  # measurements of each that do not count
STEPS = 2  # of training or evaluation, of a measurement


@dataclass
class Flags:
    commit: str = flag("HEAD", "any name that git has for it; the files here, committed or not, are beside it")
    what: str = flag("train,evaluate,decode", "which of the three, comma-separated")
    depth: int = number(6, 1, 1000, "layers of the model")
    width: int = number(384, 128, 1 << 16, "channels; heads are of 128", multiple=128)
    vocab_size: int = number(4096, 1, 1 << 24, "words of the vocabulary")
    sequence_len: int = number(256, 64, 1 << 20, "tokens of context")
    batch: int = number(8, 1, 1 << 16, "rows of a training step, sequences decoded at a time")
    rounds: int = number(15, 1, 10_000, "measurements of each, in turns")
    compile: bool = flag(True, "torch.compile for training, as scripts do by default")


def unpack(commit: str, folder: str) -> None:
    """The files of a commit. Raises UserError where git does not know it, or is not there."""
    words = ["git", "-C", str(ROOT), "archive", "--format=zip", commit]
    try:
        made = subprocess.run(words, capture_output=True, check=True)
    except FileNotFoundError:
        raise UserError("git is not installed, or not in PATH") from None
    except subprocess.CalledProcessError as problem:
        why = problem.stderr.decode(errors="replace").strip().splitlines()
        raise UserError(f"--commit is {commit!r}: {why[-1] if why else 'git archive failed'}") from None
    zipfile.ZipFile(io.BytesIO(made.stdout)).extractall(folder)


def side_by_side(flags: Flags, what: str, folders: list[str], given: dict[str, Any]) -> dict[str, Any]:
    """Rates of both, the median of the rounds' ratios with its quarters, how far two processes of one side are apart,
    and whether all losses are equal.
    """
    order = flags.batch if what == "decode" else STEPS
    program = Path(__file__).parent / WORKERS[what]
    workers = [start(folder, {**given, "evaluate": what == "evaluate"}, program) for folder in mirrored(folders)]
    rates: list[list[float]] = [[] for _ in workers]
    losses: list[list[float]] = [[] for _ in workers]
    try:
        with Count(what, WARM + flags.rounds, shown=True) as count:
            for turn in range(WARM + flags.rounds):
                for i in range(len(workers)) if turn % 2 else reversed(range(len(workers))):
                    found = measure(workers[i], order)
                    losses[i] += found.get("losses", [])
                    if turn >= WARM:
                        rates[i].append(found["tok_per_s"])
                count.tick(1)
    finally:
        for worker in workers:
            end(worker)
    ratios = [(a + d) / (b + c) for a, b, c, d in zip(*rates, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    a, b, c, d = map(statistics.median, rates)
    about = dict(what=what, ours=(a + d) / 2, before=(b + c) / 2, apart=max(a / d, d / a, b / c, c / b) - 1)
    same = all(found == losses[0] for found in losses) if losses[0] else None
    return about | dict(ratio=middle, low=low, high=high, same_losses=same)


def main() -> None:
    flags = parse(Flags, __doc__ or "")
    asked = listed("what", flags.what, WHAT)
    rows = []
    with tempfile.TemporaryDirectory() as before, tempfile.TemporaryDirectory() as drawn:
        unpack(flags.commit, before)
        given = settings(asdict(flags), drawn_weights(sizes(asdict(flags)), drawn))
        for what in asked:
            rows.append(row := side_by_side(flags, what, [str(ROOT), before], given))
            same = {True: ", the same losses", False: ", OTHER LOSSES", None: ""}[row["same_losses"]]
            print(
                f"{what:8} {row['ours']:9.0f} tok/s, before {row['before']:9.0f}: "
                f"{row['ratio']:.3f} times ({row['low']:.3f} to {row['high']:.3f}; two processes of one side are "
                f"{row['apart']:.1%} apart){same}",
                flush=True,
            )
    machine = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(json.dumps(dict(machine=machine, torch=torch.__version__, flags=asdict(flags), rows=rows)))


if __name__ == "__main__":
    run_script(main)
