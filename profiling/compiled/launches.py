"""Every launch of a training step compiled for a card that is not here, in order: what it moves and computes, and for
which line of the model. Look at `Launch`, then at `recorded`.

lower.py runs the step's generated code on fake tensors; here each launch of it is noted: a kernel that Inductor wrote
(its source says how many bytes it moves), one of ours, a library's product, what is left of ATen (work.py counts
theirs). Nothing of it is measured.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from kernels.targets import source
from kernels.triton_utils import NAMESPACE
from kernels.triton_utils import Launch as OurLaunch
from profiling.compiled import memory, provenance, work
from profiling.compiled.case import Case
from profiling.compiled.lower import Graph, Prepared

INDUCTOR, OURS, LIBRARY, ATEN, NCCL = "inductor", "ours", "library", "aten", "nccl"
PRODUCTS, ATTENTION, LOSS, STREAMING = "matrix products", "attention", "loss", "streaming"
COPIES, COMMUNICATION = "casts, copies, fills", "communication"
NOT_STREAMING = (PRODUCTS, ATTENTION)
# Operators that compute nothing.
MOVES = re.compile(r"(?:_?(?:foreach|new|to_copy|copy|clone|zeros_like|zeros|zero|full_like|full|fill|empty|t|view|"
                   r"permute|transpose|slice|select|expand|squeeze|unsqueeze|reshape|as_strided|detach|cat|stack|split|"
                   r"unbind))+_?$")  # fmt: skip
NO_LAUNCH = re.compile(r"empty|new_empty|as_strided|detach|set_|resize_|alias|record_stream|lift|_unsafe_view")


@dataclass(frozen=True)
class Launch:
    """phase: as memory.py's. kernel: key of its source among `Recorded.kernels`, "" for a library's.

    bytes: to and from memory; of NCCL's, what this rank sends.
    """

    phase: str
    who: str  # INDUCTOR, OURS, LIBRARY, ATEN, NCCL
    name: str
    category: str
    bytes: int
    flops: int
    fp8: bool
    line: str  # "gpt.py:211 › gpt.py:124": whose work it does, and who called that; "" where that is not known
    module: str  # of the model, or the optimizer's function
    kernel: str = ""


@dataclass
class Recorded:
    launches: list[Launch]
    generated: dict[str, str]  # key → Inductor's source: a kernel's name, which is its graph's, and a number
    ours: dict[str, OurLaunch]  # key → a launch whose tensors are on meta


def category(name: str) -> str:
    """Of a launch by its name, and by those of the operators fused in it.

    Inductor's kernels multiply only where they are templates, whatever products their names have from their neighbours.
    """
    if re.search(r"attention", name):
        return ATTENTION
    streams = name.startswith("triton_") and not is_template(name)
    products = r"(^|_)(mm|addmm|bmm|baddbmm|scaled_mm|product|linear_relu2)(_|:|$)|_scaled_mm"
    if not streams and re.search(products, name):
        return PRODUCTS
    if re.search(r"cross_entropy|nll_loss|log_softmax|logsumexp", name):
        return LOSS
    fused = re.sub(r"_\d+$", "", re.sub(r"^triton_[a-z]+_fused_", "", name)).strip("_")
    return COPIES if MOVES.match(fused) else STREAMING


def is_template(name: str) -> bool:
    return name.startswith("triton_tem_")


def sent(name: str, args: Sequence[Any], world: int) -> int:
    """Bytes that a rank sends in a collective over a ring: an all-reduce is a reduce-scatter and an all-gather."""
    whole = max(x.nbytes for x in tree_leaves(args) if isinstance(x, Tensor))
    return (2 if name == "allreduce_" else 1) * whole * (world - 1) // world


class Recorder:
    """Notes what is launched; `phase` is set by whoever takes the step."""

    def __init__(self, graphs: list[Graph], case: Case) -> None:
        self.phase, self.world, self.device = "", case.gpus, case.device
        self.found = Recorded([], {}, {})
        self.keys: dict[str, str] = {}  # Inductor's source → key
        self.graphs = {graph.path: (graph, graph.code.splitlines()) for graph in graphs}

    def generated(self, name: str, text: str, args: Sequence[Any]) -> None:
        """A kernel of Inductor's, or without text a library's product."""
        tensors = [x for x in args if isinstance(x, Tensor)]
        if text:
            said = re.search(r"'kernel_num_gb': ([\d.e+-]+)", text)
            template = is_template(name)  # of which the source counts no reads of its epilogue
            moved = round(float(said[1]) * 1e9) if said and not template else sum(x.nbytes for x in tensors)
            moved += sum(map(work.size, work.added_to(text, args)))
            key = self.keys.setdefault(text, f"{name}:{len(self.keys)}")
            self.found.generated[key] = text
            copies = name.startswith("triton_") and not template and work.only_moves(text)  # of C++ the name says it
            flops = work.template_flops(tensors) if template else 0
            self.add(INDUCTOR, name, moved, flops, kernel=key, kind=COPIES if copies else category(name))
        else:
            factors = tensors[-3:] if "add" in name else tensors  # (bias, a, b, out)
            fp8 = tensors[0].dtype.itemsize == 1
            self.add(LIBRARY, name, sum(x.nbytes for x in tensors), work.product_flops(factors), fp8)

    def called(self, func: Any, args: Sequence[Any], out: Any, launches: list[OurLaunch]) -> None:
        """An operator that ran as such: ours with its launches, or ATen's."""
        name = func._schema.name.split("::")[1]
        tensors = work.tensors_of((args, out))
        if not any(x.device.type == self.device for x in tensors):
            return
        if func.namespace == "c10d":
            self.add(NCCL, name, sent(name, args, self.world), 0)
            return
        flops = work.our_flops(name, args) if func.namespace == NAMESPACE else 0
        mutated, seen = work.changed(func, args), work.seen_of_caches(name, args)
        for i, launch in enumerate(launches):
            moved = work.kernel_bytes(launch, mutated, seen)
            self.ours(name, launch, moved, work.kernel_flops(launch, not i, flops))
        if func.namespace == NAMESPACE and self.device == "cpu":
            self.add(OURS, name, sum(x.nbytes for x in tensors), flops)
        if func.namespace != "aten" or func.is_view or NO_LAUNCH.match(name):
            return
        if (made := work.tensors_of(out)) and not any(x.numel() for x in made):
            return  # nothing is launched for nothing
        product = name in ("mm", "addmm", "addmm_", "bmm", "_scaled_mm")
        factors = tensors[1:] if name.startswith("addmm") else tensors
        flops = work.product_flops(factors) if product else work.attention_flops(name, args)
        self.add(ATEN, name, work.aten_bytes(func, args, out), flops, name == "_scaled_mm")

    def ours(self, op: str, launch: OurLaunch, moved: int, flops: int) -> None:
        key = repr((source(launch), sorted((k, repr(v)) for k, v in launch.constants.items())))
        if key not in self.found.ours:
            self.found.ours[key] = replace(launch, args=tuple(map(on_meta, launch.args)))
        self.add(OURS, f"{op}: {launch.kernel.fn.__name__}", moved, flops, kernel=key)

    def add(
        self, who: str, name: str, moved: int, flops: int, fp8: bool = False, kernel: str = "", kind: str = ""
    ) -> None:
        kind = COMMUNICATION if who == NCCL else kind or category(name)
        self.found.launches.append(Launch(self.phase, who, name, kind, moved, flops, fp8, *self.place(), kernel))

    @cache  # noqa: B019  a recorder lives as long as its step
    def innermost(self, path: str, number: str) -> tuple[str, str]:
        """Of the launch of this number in the graph of a file."""
        return provenance.innermost(self.graphs[path][0].traces.get(number, []))

    def place(self) -> tuple[str, str]:
        """Of the model's code whose work the generated code does at the moment; else of the code that runs."""
        frame: Any = sys._getframe(2)
        running: list[provenance.Frame] = []
        while frame:
            name = frame.f_code.co_filename
            if name in self.graphs:
                graph, lines = self.graphs[name]
                for text in reversed(lines[: frame.f_lineno]):
                    if said := re.search(r"\[Provenance debug handles\] .*:(\d+)$", text):
                        if (found := self.innermost(name, said[1]))[0]:
                            return found
                        break  # what a pass of Inductor's made has no trace
            if provenance.of_model(name):
                running.insert(0, (name, frame.f_lineno))
            frame = frame.f_back
        return provenance.locate(running) if running else ("", "")


def on_meta(value: Any) -> Any:
    """A tensor of the same dtype and alignment that holds nothing; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    offset = value.storage_offset() * value.itemsize % 16 // value.itemsize
    return torch.empty(offset + 1, dtype=value.dtype, device="meta")[offset:]


def recorded(ready: Prepared) -> tuple[Recorded, list[Any]]:
    """The launches of the second step, and its allocations (memory.py's events)."""
    recorder: Recorder | None = None

    def begun(phase: str) -> None:
        nonlocal recorder
        if recorder is None:
            recorder = Recorder(ready.graphs, ready.case)
            ready.launched.append(recorder.generated)
        recorder.phase = phase

    def called(*call: Any) -> None:
        if recorder:
            recorder.called(*call)

    events = memory.counted(ready, called, begun).events
    assert recorder is not None
    return recorder.found, events
