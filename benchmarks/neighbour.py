"""What is left of our speed on a CPU beside one other program, of training, evaluation, decoding and the server.

    python -m benchmarks.neighbour            # by ours and by OpenMP's own way in which threads wait for each other
    python -m benchmarks.neighbour | tee all.txt; tail -n 1 all.txt > benchmarks/results/neighbour-cpu.json

The last line is the result as JSON; README.md says what the committed one says (tests/test_stated_numbers.py).

Each way has processes of its own (--processes), started in the order a b b a, as one process is often faster than
another of the same; all are measured in turns, idle and beside the busy loop. `ours` is what scripts set
(nanochat/threads.py) and memory is kept (nanochat/host_memory.py); `libraries` is what torch's OpenMP and the C library
do by themselves, `given-back` the C library alone. With libiomp5.so or libomp.so in LD_PRELOAD those are measured;
their variables are among the same.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.our_step import drawn_weights
from benchmarks.worker import settings, sizes
from nanochat import host_memory, threads
from nanochat.flags import flag, listed, number, parse, run_script
from nanochat.hardware import device_name
from nanochat.turns import Worker, end, measure, mirrored, start

HERE = Path(__file__).parent
MALLOCS_OWN = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=7"}  # as it is anyway; where one is set, we set nothing
WAYS = {
    "ours": threads.BRIEFLY,
    "libraries": MALLOCS_OWN,
    "given-back": {**threads.BRIEFLY, **MALLOCS_OWN},
    "passive": {"OMP_WAIT_POLICY": "passive"},
}
SETTINGS = ("GLIBC_TUNABLES", *threads.VARIABLES, *host_memory.VARIABLES)
WORKERS = dict(
    train="train_worker.py", evaluate="train_worker.py", decode="decode_worker.py", server="server_worker.py"
)
BUSY = [sys.executable, "-c", f"import os\nwhile os.getppid() == {os.getpid()}: pass"]  # no longer than we live
STEPS = 4  # of training or evaluation, of a measurement
WARM = 2  # measurements before the first that counts


@dataclass
class Flags:
    what: str = flag(",".join(WORKERS), "which of them, comma-separated")
    ways: str = flag("ours,libraries", f"settings of threads and malloc, comma-separated: {', '.join(WAYS)}")
    depth: int = number(6, 1, 1000, "layers of the model")
    width: int = number(384, 128, 1 << 16, "channels; heads are of 128", multiple=128)
    vocab_size: int = number(4096, 1, 1 << 24, "words of the vocabulary")
    sequence_len: int = number(256, 64, 1 << 20, "tokens of context")
    batch: int = number(8, 1, 1 << 16, "rows of a training step, sequences decoded and streams read at a time")
    rounds: int = number(5, 1, 10_000, "measurements of each process, in turns")
    processes: int = number(2, 2, 64, "processes of each way, an even number", multiple=2)
    compile: bool = flag(True, "torch.compile, as scripts do by default")


@contextmanager
def neighbour() -> Iterator[None]:
    """A process that computes without end."""
    busy = subprocess.Popen(BUSY)
    try:
        yield
    finally:
        busy.kill()
        busy.wait()


def worker(what: str, way: str, settings: dict[str, Any]) -> Worker:
    others = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    environment = {**others, **WAYS[way]}
    return start(str(HERE.parent), {**settings, "evaluate": what == "evaluate"}, HERE / WORKERS[what], environment)


def rates(flags: Flags, what: str, ways: list[str], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a way: medians of tokens per second, idle and beside, and the second's share of the first."""
    order = flags.batch if what in ("decode", "server") else STEPS
    rows = [dict(what=what, way=way, idle=[], beside=[]) for way in ways]
    both = [(row, worker(what, row["way"], settings)) for row in mirrored(rows) * (flags.processes // 2)]
    try:
        for turn in range(WARM + flags.rounds):
            for row, process in both if turn % 2 else both[::-1]:
                alone = measure(process, order)
                row["about"] = alone["about"]
                if turn < WARM:
                    continue
                row["idle"].append(alone["tok_per_s"])
                with neighbour():
                    row["beside"].append(measure(process, order)["tok_per_s"])
    finally:
        for _, process in both:
            end(process)
    for row in rows:
        row["idle"], row["beside"] = statistics.median(row["idle"]), statistics.median(row["beside"])
        row["share"] = row["beside"] / row["idle"]
    return rows


def main() -> None:
    flags = parse(Flags, __doc__ or "")
    asked, ways = listed("what", flags.what, WORKERS), listed("ways", flags.ways, WAYS)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        given = settings(asdict(flags), drawn_weights(sizes(asdict(flags)), folder))
        for what in asked:
            for row in rates(flags, what, ways, given):
                rows.append(row)
                beside = f"{row['beside']:9.0f} beside a busy process ({row['share']:.0%}; {row['about']})"
                print(f"{what:8} {row['way']:9} {row['idle']:9.0f} tok/s idle, {beside}", flush=True)
    print(
        json.dumps(
            dict(machine=device_name(torch.device("cpu")), torch=torch.__version__, flags=asdict(flags), rows=rows)
        )
    )


if __name__ == "__main__":
    run_script(main)
