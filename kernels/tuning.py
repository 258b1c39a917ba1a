"""Measuring block sizes on the GPU that is here: `python -m kernels tune`, and what a first training does by itself.

An op's forward and backward are timed together. From the row in force, one block size at a time is halved or doubled;
a neighbour that is faster, timed in turns with the best so far so that a change of clocks meets both alike, becomes the
best, until none is, or the time is over. A candidate must give the right answer first. The compiled reference is timed
beside it where asked for: alone, an op says little about a compiled step, in which its neighbours may be fused. Rows
that ops share are searched with the op that comes first. The ops share the time, and what one leaves, others have.
"""

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch

from . import dispatch, measured, probing, tuned
from .dispatch import use
from .registry import OPS, Case, Op, tensors

FIXED = ("GROUP_M",)  # order of programs: nothing that could not be a little better or worse on any card
ADDED = ("num_stages",)  # what goes up and down by one; the rest is a power of two
GAIN = 0.98  # of the best time that a neighbour must stay below
REPEATS = 15
# Rows that kernels of an op's backward have of their own.
BACKWARD = {"flash_attention": ("flash_attention_backward", "flash_attention_dq_backward")}
SWEEPS, MOST_SWEEPS = 4, 128  # queued before a call on a GPU, to begin with and at most: 32 GB, 10 ms at 3 TB/s
EASED = 64  # calls in a row for which there were enough, before half as many are tried again
# In training these get float32 weights and gradients, and their products are in bfloat16, but on cards without it.
# adamw_ does most of its work on tables in bfloat16.
MASTERS = ("muon_momentum_", "muon_update_")
MOST_BYTES = 3e9  # of a registered case; cross_entropy at d12 would be 4.3 GB, and several times that in the reference
# Those with the most to gain come first, the others as in the table. Of ops that share rows the first is the one that
# training runs, for its sake the rows are searched.
FIRST = (
    "flash_attention", "polar_express", "embedding", "mlp_relu2", "linear_cross_entropy", "cross_entropy",
    "mix_rms_norm", "qk_norm_rotary", "flash_attention_decode", "muon_update_", "muon_momentum_", "adamw_",
    "fp8_mlp_relu2",
)  # fmt: skip
Say = Callable[[str], None]
Clock = Callable[[Callable[[], Any]], float | None]


def neighbours(config: dict[str, int]) -> list[dict[str, int]]:
    """One block size changed by a step, up or down; every value stays at least 1."""
    found = []
    for key, value in config.items():
        if key not in FIXED:
            steps = (value - 1, value + 1) if key in ADDED else (value // 2, value * 2)
            found += [{**config, key: step} for step in steps if step >= 1]
    return found


def clock(device: str = "cuda") -> Clock:
    """A function that takes the milliseconds of one call, which finds the caches swept; None: take it again.

    On a GPU, sweeps are queued before the call, so that its launches wait in line and what is timed is the card's work,
    not the host's. Where the card was through with them before the host had queued the call, the time is none, and
    twice as many come before the next calls. With MOST_SWEEPS it counts: then the call itself waits for the card.
    """
    on_gpu = device.startswith("cuda")
    sweep = torch.empty((256 if on_gpu else 64) << 20, dtype=torch.int8, device=device)
    sweeps, enough = SWEEPS, 0  # enough: calls in a row for which so many were

    def on_card(call: Callable[[], Any]) -> float | None:
        nonlocal sweeps, enough
        for _ in range(sweeps):
            sweep.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        late = start.query()
        end.record()
        torch.cuda.synchronize()
        enough = 0 if late else enough + 1
        if late and sweeps < MOST_SWEEPS:
            sweeps *= 2
            return None
        if enough == EASED:
            sweeps, enough = max(SWEEPS, sweeps // 2), 0
        return start.elapsed_time(end)

    def on_host(call: Callable[[], Any]) -> float:
        sweep.zero_()
        started = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - started)

    return on_card if on_gpu else on_host


def turns(prepared: list[Callable[[], Callable[[], Any]]], clock: Clock) -> Iterator[list[float]]:
    """For ever: milliseconds of every call, taken one after the other, so that a change of clocks meets all alike.

    Each of `prepared` does what shall not be timed and returns the call that shall. A turn in which the clock has no
    time for a call is left out.
    """
    while True:
        times = [clock(prepare()) for prepare in prepared]
        taken = [ms for ms in times if ms is not None]
        if len(taken) == len(times):
            yield taken


def timed(calls: list[Callable[[], Any]], repeats: int = REPEATS) -> list[float]:
    """Median milliseconds of each call on the GPU, after two turns that are not counted."""
    rounds = turns([lambda call=call: call for call in calls], clock())  # type: ignore[misc]
    return [statistics.median(taken) for taken in zip(*itertools.islice(rounds, 2, repeats + 2))]


def step(op: Op, case: Case, dtype: torch.dtype, setting: str, compiled: bool) -> Callable[[], Any]:
    """A call that runs the op, forward and backward, in an implementation."""
    inputs = op.inputs(case, dtype, "cuda")
    for name in op.differentiable:
        inputs[name].requires_grad_()
    function = torch.compile(op.fn, dynamic=False) if compiled else op.fn

    def call() -> None:
        with use(f"torch,{op.name}={setting}"):
            result = function(**inputs)
            if op.differentiable:
                outputs = [output for output in tensors(result) if output.requires_grad]
                torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
                for name in op.differentiable:
                    inputs[name].grad = None

    return call


def right(op: Op, case: Case, dtype: torch.dtype, device: str = "cuda") -> bool:
    """Whether the kernel's results and gradients are the reference's in the same dtype, within several roundings.

    Not against float64, as a card is probed: these cases are as large as a model's.
    """
    assert op.triton is not None
    inputs = op.inputs(case, dtype, device)
    found, usual = (probing.answers(op, call, inputs) for call in (op.triton, op.reference))
    allowed = [4 * tolerance for tolerance in probing.tolerances(op, dtype, len(usual))]
    return all(probing.relative(a, b) <= most for a, b, most in zip(found, usual, allowed))


def climb(
    op: Op, case: Case, dtype: torch.dtype, rows: str, start: dict[str, int], ends: float, say: Say
) -> tuple[dict[str, int], float]:
    """(the fastest config found for the rows of this name, its milliseconds), before time.monotonic() is `ends`.

    Nothing is tried that would end later, were it as slow as the slowest so far. Raises RuntimeError when not even
    `start` runs and is right.
    """
    began = time.monotonic()
    kernel = step(op, case, dtype, "triton", compiled=False)

    def trial(config: dict[str, int]) -> Callable[[], None]:
        def call() -> None:
            with tuned.trial(rows, config):
                kernel()

        return call

    def check(config: dict[str, int]) -> None:
        with tuned.trial(rows, config):
            if not right(op, case, dtype):
                raise RuntimeError("its answer is wrong")

    check(start)
    best, (ms,) = start, timed([trial(start)])
    slowest = time.monotonic() - began
    tried, improved = [start], True
    while improved:
        improved = False
        for config in neighbours(best):
            begun = time.monotonic()
            if config in tried or begun + slowest > ends:
                continue
            tried.append(config)
            try:
                check(config)
                now, then = timed([trial(config), trial(best)])
            except Exception as problem:  # too much shared memory, too many registers: not a candidate
                dispatch.check_alive(f"{op.name}, {config}", dispatch.without(op.name))
                say(f"{op.name}: {config} does not run: {one_line(problem)}")
                continue
            finally:
                slowest = max(slowest, time.monotonic() - begun)
            if now < GAIN * then:
                best, ms, improved = config, now, True
                break  # its own neighbours come next
    return best, ms


def share(ends: float, count: int) -> float:
    """When the first of so many that have the time until `ends` must be done."""
    now = time.monotonic()
    return now + (ends - now) / count


def measure(
    op: Op, case: Case, dtype: torch.dtype, searched: set[tuple[str, int]], ends: float = math.inf,
    reference: bool = True, say: Say = print,
) -> measured.Blocks:  # fmt: skip
    """Rows for the op (by its own name) and for kernels of its backward that have rows of their own, at this case.

    searched: (owner of rows, size) for which nothing is searched any more: such rows are taken as they are; this one's
    are added. Rows that are searched with an op that does not own them become the owner's too, so that all that share
    them have them. Raises RuntimeError when its kernels do not run.
    """
    device, size, found = torch.device("cuda", torch.cuda.current_device()), op.size(case), {}
    parts = [op.name, *BACKWARD.get(op.name, ())]
    for i, part in enumerate(parts):
        start, owner = tuned.config(part, dtype, size, device), tuned.owner(part)
        new = (owner, size) not in searched
        until = share(ends, len(parts) - i + reference) if new else 0.0
        config, ms = climb(op, case, dtype, part, start, until, say)
        found[part] = [dict(dtype=str(dtype)[6:], up_to=size, config=config, ms=ms)]
        if new and owner != part:
            found[owner] = [dict(found[part][0], measured_with=op.name)]
        searched.add((owner, size))
        measured.adopt(_merged(measured.blocks(device.index or 0), found))  # backward's turn meets the new forward
    if reference:
        row, memory = found[op.name][0], False
        try:
            calls = [step(op, case, dtype, "triton", compiled=False), step(op, case, dtype, "torch", compiled=True)]
            row["ms"], row["reference_ms"] = timed(calls)
        except torch.OutOfMemoryError:
            memory = True
        except Exception as problem:  # of the compiler: what was found stays
            dispatch.check_alive(f"{op.name}, compiled reference", dispatch.without(op.name))
            say(f"{op.name}: its compiled reference was not timed: {one_line(problem)}")
        if memory:
            say(f"{op.name}: its compiled reference does not fit in the memory of this card: not timed")
            _empty_cache()  # only now: the exception held what was allocated
    return found


def _empty_cache() -> None:
    with suppress(RuntimeError):
        torch.cuda.empty_cache()


def one_line(problem: Exception) -> str:
    """In a line. Triton's compiler begins with where it was, and says last what is wrong."""
    kind, lines = type(problem).__name__, [line.strip() for line in str(problem).split("\n") if line.strip()] or [""]
    return f"{kind}: {lines[-1 if kind == 'CompilationError' else 0]}"


def tune(
    cases: Mapping[str, list[Case]], seconds: float = math.inf, reference: bool = True, say: Say = print,
    keep: Callable[[measured.Blocks], Any] = lambda rows: None,
) -> measured.Blocks:  # fmt: skip
    """Rows by op for its cases, one of each size, as far as the time goes; progress is said.

    The ops that are left share the time that is left. The reference is compiled for the first case that runs, and where
    it was measured for this very size before: that would else be decided by another size's time from now on. Without
    the reference, such sizes stay as they are. `keep` gets all rows so far after every op. This process uses them from
    then on. On AMD's cards a child compiles what is in force first, but candidates are compiled here, and one may end
    the process. Raises ValueError without a CUDA device, dispatch.Lost where a candidate has made it useless.
    """
    if not torch.cuda.is_available():
        raise ValueError("tuning needs a CUDA device, and there is none here")
    index = torch.cuda.current_device()
    new = bool(torch.version.hip) or torch.cuda.get_device_capability(index) >= dispatch.LEAST
    ends, found, searched = time.monotonic() + seconds, dict(measured.blocks(index)), set[tuple[str, int]]()
    for i, (name, several) in enumerate(cases.items()):
        dtype = torch.bfloat16 if new else torch.float16
        if name in MASTERS:
            dtype, several = torch.float32, [dict(case, mixed=int(new)) for case in several]
        until, sizes = share(ends, len(cases) - i), _one_a_size(OPS[name], several)
        known = {size for size in sizes if _beside_reference(name, dtype, size, index)}
        sizes = sizes if reference else {size: case for size, case in sizes.items() if size not in known}
        compared = not reference  # whether nothing of the op is to be timed beside the reference any more
        for j, (size, case) in enumerate(sizes.items()):
            what = f"{name}, size {size}"
            if time.monotonic() > until:
                say(f"{what}: no time was left; its static block sizes stay")
                continue
            if why := dispatch.uncompilable(name, dtype, size, index):
                say(f"{what}: not tuned: {why}")
                continue
            memory = False
            try:
                mine = share(until, len(sizes) - j)
                beside = reference and (not compared or size in known)
                rows = measure(OPS[name], case, dtype, searched, mine, beside, say)
            except Exception as problem:  # its kernels do not run here: dispatch will find out and say so
                dispatch.check_alive(what, dispatch.without(name))
                memory = isinstance(problem, torch.OutOfMemoryError)
                why = "it does not fit in the memory of this card" if memory else one_line(problem)
                say(f"{what}: not tuned: {why}")
            else:
                found, compared = _merged(found, rows), True
                for part, (row,) in rows.items():
                    other = f", compiled reference {row['reference_ms']:.4f} ms" if "reference_ms" in row else ""
                    say(f"{part:24} {row['ms']:.4f} ms{other}, {row['config']}")
            measured.adopt(found)
            if memory:
                _empty_cache()  # only now: the exception held what was allocated
        dispatch.forget()
        keep(found)
    return found


def _beside_reference(op: str, dtype: torch.dtype, size: int, index: int) -> bool:
    """Whether this very size was measured beside the compiled reference."""
    row = tuned.measured(op, dtype, size, torch.device("cuda", index))
    return row is not None and row.get("up_to") == size


def _one_a_size(op: Op, cases: list[Case]) -> dict[int, Case]:
    """The first case of each size: a row is for a size."""
    found: dict[int, Case] = {}
    for case in cases:
        found.setdefault(op.size(case), case)
    return found


def _merged(rows: measured.Blocks, new: measured.Blocks) -> measured.Blocks:
    """Both, by size; of two for the same dtype and size, the new one."""
    found = dict(rows)
    for part, more in new.items():
        same = {(row["dtype"], row["up_to"]): row for row in [*found.get(part, []), *more]}
        found[part] = sorted(same.values(), key=lambda row: row["up_to"])
    return found


def registered_cases(names: list[str]) -> dict[str, list[Case]]:
    """The registry's cases at the sizes of models, the largest size first; the ops in the order of FIRST."""
    place = {name: i for i, name in enumerate(FIRST)}
    found = {}
    for name in sorted(names, key=lambda name: place.get(name, len(place))):
        size = lambda case, op=OPS[name]: (op.size(case), op.bytes(case, torch.bfloat16))
        fit = [case for key, case in OPS[name].cases.items() if key.startswith("d") and size(case)[1] <= MOST_BYTES]
        found[name] = sorted(fit, key=size, reverse=True)
    return found


def into_repository(rows: measured.Blocks) -> None:
    """Writes kernels/tuned/<arch>.json: what contributors commit. Rows that are there for other sizes stay."""
    index = torch.cuda.current_device()
    path = tuned.FOLDER / f"{tuned.architecture(index)}.json"
    before = tuned.table(tuned.architecture(index))
    lists = {name: found for name, found in before.items() if isinstance(found, list)}
    merged = _merged({name: [row for row in found if "up_to" in row] for name, found in lists.items()}, rows)
    unlimited = {name: [row for row in found if "up_to" not in row] for name, found in lists.items()}
    table = before | {name: merged.get(name, []) + unlimited.get(name, []) for name in {**lists, **merged}}
    measured.replace(path, json.dumps(table, indent=1) + "\n")
    tuned.table.cache_clear()
