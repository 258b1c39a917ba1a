"""`python -m kernels`: which implementation each op runs on this machine, and why.

python -m kernels                                       the table
python -m kernels compile [--op OP] [--target T] …      compile for cards that are not here, and read the machine code
python -m kernels tune [--op OP] [--into-repo]          measure block sizes on this GPU; they are used from then on
python -m kernels readme                                write kernels/README.md from compiling and interpreting
"""

import argparse
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable

import torch

from . import OPS, child_compile, dispatch, measured, readme, tuned, tuning
from .architectures import ALL_TARGETS, TARGETS
from .attention import backends
from .triton_utils import INSTALLED, INTERPRETED, triton

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main() -> None:
    name = f"python -m {__package__}"
    about = (__doc__ or "").replace("python -m kernels", name)
    parser = argparse.ArgumentParser(prog=name, description=about, formatter_class=_Formatter)
    commands = parser.add_subparsers(dest="command")
    compile_ = commands.add_parser("compile", help="compile for cards that are not here", formatter_class=_Formatter)
    compile_.add_argument("--op", help="comma-separated; default: all that have a kernel")
    compile_.add_argument(
        "--target", help=f"comma-separated, of {', '.join(ALL_TARGETS)}; default: {', '.join(TARGETS)}"
    )
    compile_.add_argument(
        "--shape", default="d24", help="comma-separated cases of the op's registry entry; its largest if it has none so"
    )
    compile_.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of the inputs")
    compile_.add_argument("--json", action="store_true", help="print JSON, a list of one object a kernel and target")
    tune = commands.add_parser("tune", help="measure block sizes on this GPU", formatter_class=_Formatter)
    tune.add_argument("--op", help="comma-separated; default: all that have a kernel")
    tune.add_argument("--minutes", type=float, default=math.inf, help="stop then, with what there is")
    tune.add_argument(
        "--into-repo", action="store_true", help="write kernels/tuned/<arch>.json, to be committed, and not the cache"
    )
    commands.add_parser("readme", help="write kernels/README.md")
    flags = parser.parse_args()
    try:
        if __package__ != "kernels" and (flags.command == "readme" or getattr(flags, "into_repo", False)):
            raise ValueError("that writes into the repository's kernels/; here the ops are installed by themselves")
        if flags.command == "compile":
            compile_report(flags)
        elif flags.command == "tune":
            tune_and_store(flags)
        elif flags.command == "readme":
            readme.write()
        else:
            describe()
    except (ValueError, dispatch.Lost) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except OSError as problem:  # a file that cannot be read or written
        if isinstance(problem, BrokenPipeError):
            raise
        where, why = problem.filename or "a file", problem.strerror or problem
        print(f"error: {where}: {why}; look at its disk and its permissions", file=sys.stderr)
        sys.exit(2)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def chosen_ops(names: str | None) -> list[str]:
    """The ops of a comma-separated flag. Raises ValueError for one without a Triton kernel."""
    if names is None:
        return tuned.ops()
    for name in names.split(","):
        if name not in tuned.ops():
            raise ValueError(f"--op names {name!r}; the ops with a Triton kernel are {', '.join(tuned.ops())}")
    return names.split(",")


def describe() -> None:
    version = f"Triton {triton.__version__}" + (" (interpreter)" if INTERPRETED else "") if INSTALLED else "no Triton"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    print(f"torch {torch.__version__}, {version}, {device}")
    for op, implementation, why in dispatch.describe():
        print(f"  {op:24} {implementation:8} {why}")
    for name, state in backends.describe():
        print(f"  flash_attention: {name:8} {state}")
    # A GPU's autograd thread may still be letting go of what the last probe made: Python that ends under it is aborted.
    time.sleep(0.2)


def tune_and_store(flags: argparse.Namespace) -> None:
    """What is found is written after every op, so that whatever ends this loses nothing but the op at work.

    Raises ValueError without a CUDA device, or for minutes that are none.
    """
    if not flags.minutes > 0:
        raise ValueError(f"--minutes is {flags.minutes:g}, wanted more than 0")

    def keep(rows: measured.Blocks) -> None:
        if flags.into_repo:
            tuning.into_repository(rows)
        else:
            measured.store(torch.cuda.current_device(), blocks=rows)

    stopped = False
    try:
        tuning.tune(tuning.registered_cases(chosen_ops(flags.op)), 60 * flags.minutes, keep=keep)
    except KeyboardInterrupt:
        stopped = True
    except dispatch.Lost as problem:
        raise dispatch.Lost(f"{problem}, or tune the others (--op): what was found is kept") from None
    index = torch.cuda.current_device()
    path = tuned.FOLDER / f"{tuned.architecture(index)}.json" if flags.into_repo else measured.path(index)
    print(("stopped; " if stopped else "") + (f"written: {path}" if path.exists() else "nothing was written"))
    if stopped:
        sys.exit(130)


def compile_report(flags: argparse.Namespace) -> None:
    """Exits with 1 when any kernel breaks a promise."""
    if not INSTALLED or INTERPRETED:
        raise ValueError("compiling needs Triton (pip install triton)" if not INSTALLED else "unset TRITON_INTERPRET")
    chosen = list(TARGETS) if flags.target is None else flags.target.split(",")
    for name in chosen:
        if name not in ALL_TARGETS:
            raise ValueError(f"--target names {name!r}; the targets are {', '.join(ALL_TARGETS)}")
    cases, shapes = dict.fromkeys(case for op in OPS.values() for case in op.cases), flags.shape.split(",")
    for shape in shapes:
        if shape not in cases:
            raise ValueError(f"--shape names {shape!r}, which no op has; there are {', '.join(cases)}")
    ops = chosen_ops(flags.op)
    print(f"compiling {len(ops)} op{'s' * (len(ops) > 1)} for {', '.join(chosen)} …", file=sys.stderr, flush=True)
    rows = child_compile.report(ops, chosen, shapes, DTYPES[flags.dtype])
    if flags.json:
        print(json.dumps(rows, indent=1))
    else:
        print(f"{'kernel':26} {'op':21} {'target':7} {'shape':9} regs spill shared  occ. access tensor core  faults")
        for row in rows:
            if row["error"]:
                print(f"{row['kernel']:26} {row['op']:21} {row['target']:7} {row['shape']:9} error: {row['error']}")
                continue
            print(
                f"{row['kernel']:26} {row['op']:21} {row['target']:7} {row['shape']:9} {row['registers']:4} "
                f"{row['spill_bytes']:5} {row['shared_bytes']:6} {row['occupancy']:5.0%} {row['access_bytes']:4} B "
                f"{row['tensor_core'] or '–':12} {'; '.join(row['faults']) or '–'}"
            )
    if any(row["faults"] for row in rows):
        sys.exit(1)


def quietly(run: Callable[[], None]) -> None:
    """Prints whatever the terminal's encoding, and ends without a word when whoever reads has gone."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            run()
        finally:
            print(end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would complain when it flushes at the end


if __name__ == "__main__":
    quietly(main)
