"""What a training step allocates on a card that is not here, counted allocation by allocation. Look at `Allocations`.

    python -m profiling memory [--card h100] [--depth 24] …        the parts predicted, and those counted

lower.py runs the step's generated code, autograd's engine and the optimizer on fake CUDA tensors; a dispatch mode sees
every tensor that is made and when its storage is freed. Our operators are run by their launchers within it, so what
they allocate inside counts too. What a library allocates inside one call of ATen's (cuBLAS's workspace, a sort's
temporaries) does not. A step recorded on a CPU is beside it in tests/test_compiled_cpu.py. Published points cannot be:
all 43 of SimuMax's on B200 split one model over cards (tensor, pipeline, expert, context), which this one never does.
"""

import linecache
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.triton_utils import NAMESPACE, capture
from nanochat.cost import ASSUMED, training_memory
from nanochat.flags import flag, number, parse
from nanochat.recipe import model_config
from profiling.compiled.case import Case
from profiling.compiled.lower import Prepared, ask, check_kernels, child_case, child_ends, prepared

ROUND = 512  # bytes: the CUDA caching allocator's grain
NOT_ASKING = ("/torch/", "compiled/lower.py", "compiled/memory.py")  # files whose lines say nothing of an allocation


@dataclass
class Block:
    """A storage: bytes, what for, and the line that made it, of generated code or ours.

    Kinds: what is there before the step has names of its own; `saved` is what a forward graph returned, `gradients`
    what a backward graph returned, `workspace` everything else; of what is there before the step, line is "".
    """

    size: int
    kind: str
    line: str


class Allocations(TorchDispatchMode):
    """Notes the birth and death of every storage made within it on a device: (phase, +1 or −1, block), in order."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # what was compiled before runs within it

    def __init__(
        self, launchers: dict[str, Any], called: Callable[..., None] = lambda *call: None, device: str = "cuda"
    ) -> None:
        """called: with (operator, arguments, result, launches of our kernels) of each that has run."""
        super().__init__()
        self.launchers = launchers  # of our operators, by name
        self.called, self.device = called, device
        self.phase = "before"
        self.events: list[tuple[str, int, Block]] = []
        self._alive: dict[int, tuple[Block, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == NAMESPACE:
            with self, capture() as launches, self.silent():
                out = self.launchers[func._schema.name](*args, **(kwargs or {}))
            self.called(func, args, out, launches)
            return out
        out = func(*args, **(kwargs or {}))
        self.called(func, args, out, [])
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.note(tensor, "workspace")
        return out

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Within an operator of ours, which on a CPU is one call: what it calls in turn is its own."""
        before = self.called
        self.called = (lambda *call: None) if self.device == "cpu" else before
        try:
            yield
        finally:
            self.called = before

    def note(self, tensor: Tensor, kind: str) -> None:
        """Counts a tensor's storage, where it is on the device and not known yet."""
        if tensor.device.type != self.device:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            grain = ROUND if self.device == "cuda" else 1
            block = Block(-(-storage.nbytes() // grain) * grain, kind, _line() if kind == "workspace" else "")
            self._alive[key] = block, weakref.ref(storage, lambda _: self._freed(key))
            self.events.append((self.phase, 1, block))

    def _freed(self, key: int) -> None:
        self.events.append((self.phase, -1, self._alive.pop(key)[0]))

    def end(self) -> None:
        """What is freed from now on is not noted: the program itself may go."""
        self._alive.clear()

    def name(self, tensor: Tensor, kind: str) -> None:
        """Gives a storage of the workspace its kind; others have theirs."""
        found = self._alive.get(tensor.untyped_storage()._cdata)
        if found and found[0].kind == "workspace":
            found[0].kind = kind


def _line() -> str:
    frame: Any = sys._getframe(2)
    while frame and any(part in frame.f_code.co_filename for part in NOT_ASKING):
        frame = frame.f_back
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip() if frame else ""


def counted(
    ready: Prepared,
    called: Callable[..., None] = lambda *call: None,
    begun: Callable[[str], None] = lambda phase: None,
) -> Allocations:
    """The second step's allocations, after what is there before it; the first step compiles and makes the moments.

    called: as Allocations'; begun: with each phase of that step.
    """
    from torch._library.custom_ops import OPDEFS

    with ready.fake:
        ready.step()
        launchers = {name: op._init_fn for name, op in OPDEFS.items()}
        allocations = Allocations(launchers, called, ready.case.device)
        for kind, tensors in ready.program.held().items():
            for tensor in tensors:
                allocations.note(tensor, kind)

        def returned(graph: str, out: Any) -> None:
            kind = dict(forward="saved", backward="gradients").get(graph)
            for tensor in out if kind else ():
                if isinstance(tensor, Tensor):
                    allocations.name(tensor, kind)  # type: ignore[arg-type]

        def mark(phase: str) -> None:
            allocations.phase = phase
            begun(phase)

        ready.returned.append(returned)
        with allocations:
            ready.step(mark)
        allocations.end()
    return allocations


def report(events: list[tuple[str, int, Block]]) -> dict[str, Any]:
    """Of each phase: bytes at its peak, then and after it by kind, and the blocks that were alive at the peak.

    Blocks of more than a megabyte, as [bytes together, how many, kind, line], largest first.
    """
    found: dict[str, Any] = {}
    alive: dict[int, Block] = {}
    total = 0
    for phase in dict.fromkeys(phase for phase, _, _ in events):
        most, at_peak = 0, []
        for when, sign, block in events:
            if when != phase:
                continue
            total += sign * block.size
            if sign > 0:
                alive[id(block)] = block
            else:
                if total + block.size > most:
                    most, at_peak = total + block.size, list(alive.values())
                del alive[id(block)]
        if total > most:
            most, at_peak = total, list(alive.values())
        large = Counter((block.kind, block.line, block.size) for block in at_peak if block.size >= 1 << 20)
        rows = sorted(((size * n, n, kind, line) for (kind, line, size), n in large.items()), key=lambda row: -row[0])
        found[phase] = dict(peak=most, kinds=by_kind(at_peak), after=by_kind(alive.values()), blocks=rows)
    return found


def curve(events: list[tuple[str, int, Block]], points: int = 400) -> dict[str, Any]:
    """`bytes` allocated over the step, the most of each stretch of calls; `phases`: in which stretch each begins."""
    total = 0
    sizes: list[int] = []
    first: dict[str, int] = {}
    for phase, sign, block in events:
        first.setdefault(phase, len(sizes))
        total += sign * block.size
        sizes.append(total)
    step = max(1, -(-len(sizes) // points))
    most = [max(sizes[i : i + step]) for i in range(0, len(sizes), step)]
    return dict(bytes=most, phases={phase: at // step for phase, at in first.items()})


def by_kind(blocks: Iterable[Block]) -> dict[str, int]:
    """Bytes by kind, largest first."""
    kinds: Counter[str] = Counter()
    for block in blocks:
        kinds[block.kind] += block.size
    return dict(kinds.most_common())


def measured(case: Case, card: str = "h100") -> dict[str, Any]:
    """{"graphs": names, "phases": report, "peak": bytes} of a case on a card. Raises as lower.ask."""
    return ask("profiling.compiled.memory", case, card)


def predicted(case: Case) -> dict[str, int]:
    """cost.training_memory of a case, without what is assumed and not counted; the step here is not replayed."""
    from nanochat.gpt import GPTConfig

    config = GPTConfig(**case.config)
    kernels = "torch" if case.kernels == "torch" else "auto"
    tokens = case.rows * config.sequence_len
    parts = training_memory(config, tokens, 1, case.dtype, case.fp8, kernels, replayed=False)
    left_out = ASSUMED if case.optimizer else (*ASSUMED, "moments")
    return {name: size for name, size in parts.items() if name not in left_out}


def answer() -> None:
    """What a child of `measured` does."""
    case = child_case()
    ready = prepared(case)
    phases = report(counted(ready).events)
    peak = max(phase["peak"] for phase in phases.values())
    child_ends(dict(graphs=[graph.name for graph in ready.graphs], phases=phases, peak=peak))


@dataclass
class Flags:
    card: str = flag("h100", "which card (null_cards.py)")
    depth: int = number(24, 1, 1000, "layers of the model; width and heads follow")
    rows: int = number(16, 1, 1 << 16, "of a micro-batch")
    dtype: str = flag("bfloat16", "of the activations", choices=("bfloat16", "float16", "float32"))
    fp8: str = flag("", "scaling of fp8 products; empty: none", choices=("", "current", "delayed"))
    kernels: str = flag("auto", "as NANOCHAT_KERNELS")
    optimizer: bool = flag(False, "compile its updates too, and count them")


def main() -> None:
    flags = parse(Flags, __doc__ or "")
    check_kernels(flags.kernels)
    case = Case(
        asdict(model_config(flags.depth, 32768)), flags.rows, flags.dtype, flags.fp8, flags.kernels, flags.optimizer
    )
    found, parts = measured(case, flags.card), predicted(case)
    total = sum(parts.values())
    print(f"predicted {total / 2**30:.2f} GiB, counted {found['peak'] / 2**30:.2f} ({total / found['peak'] - 1:+.1%})")
    for name, size in sorted(parts.items(), key=lambda part: -part[1]):
        print(f"  {size / 2**30:7.2f}  {name}")
    for phase, row in found["phases"].items():
        kinds = ", ".join(f"{kind} {size / 2**30:.2f}" for kind, size in row["kinds"].items())
        print(f"\n{phase}: {row['peak'] / 2**30:.2f} GiB ({kinds})")
        for size, count, kind, line in row["blocks"][:12]:
            print(f"  {size / 2**30:7.2f}  {count:3} x {kind:14} {line[:100]}")


if __name__ == "__main__":
    answer()
