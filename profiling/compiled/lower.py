"""The training step as Inductor would compile it for a card that is not here, run line by line on fake tensors.

On the null device (null_device.py) `torch.compile` goes its whole way: Dynamo, AOTAutograd with its partitioner,
Inductor's passes, its scheduler, the generated wrapper. Only the generated Triton kernels are not compiled. The wrapper
then runs on fake CUDA tensors: every allocation, reuse and free happens in its order, every launch does nothing. So
memory.py can count the bytes of a whole step, and whoever wants to read the code has it in `graphs`.

`prepared` is for a process with the null device; `ask` starts one and reads its JSON. The model, what is kept and cast
once, and the optimizer are as the training loop has them on CUDA.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from nanochat.errors import UserError
from nanochat.processes import end_at_once
from profiling.compiled import null_device
from profiling.compiled.case import Case

if TYPE_CHECKING:
    from profiling.compiled.programs import Program

ROOT = Path(__file__).parents[2]
IN_TURN = "NANOCHAT_LOWERED_IN_TURN"  # variable of a child that is to lower forward first, then backward
OTHER_STRIDES = 81  # exit code of one that is to be asked again so
SIZES = "20000"  # expressions that SymPy remembers: at depth 24 its own thousand are forgotten before they come again


@dataclass
class Graph:
    """One compiled graph: the wrapper that Inductor wrote, with the Triton sources."""

    name: str  # forward, backward, inference (an optimizer's update)
    path: str  # of the file that the code is in
    code: str
    inputs: list[str]  # names in the code, in the order of arguments
    traces: dict[str, list[str]]  # a launch's number, as in the comment above it → stack traces of what it computes


def triton_version() -> str:
    """Raises UserError where Triton is not installed."""
    try:
        import triton
    except ImportError:
        raise UserError(
            "the step's kernels are compiled by Triton, which is not installed: pip install triton"
        ) from None
    return str(triton.__version__)


def ask(module: str, case: Case, card: str) -> Any:
    """Runs `python -m module` with a case on the null device of a card, or for this CPU; returns the JSON it leaves.

    Raises UserError where there can be no null device, or no Triton; RuntimeError with the child's last lines when it
    fails.
    """
    if case.device != "cpu":
        triton_version()
    try:
        of_card = dict(os.environ) if case.device == "cpu" else null_device.environment(card, 1)
    except ValueError as problem:
        raise UserError(f"--card: {problem}") from None
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        environment = dict(of_card, TORCHINDUCTOR_CACHE_DIR=folder, OMP_NUM_THREADS="1", SYMPY_CACHE_SIZE=SIZES)
        for name in ("TRITON_INTERPRET", "NANOCHAT_KERNELS"):
            environment.pop(name, None)
        command = [sys.executable, "-m", module, json.dumps(asdict(case)), str(answer)]
        for further in ({}, {IN_TURN: "1"}):
            ran = subprocess.run(command, env=environment | further, cwd=ROOT, capture_output=True, text=True)
            if ran.returncode != OTHER_STRIDES:
                break
        if ran.returncode or not answer.exists():
            raise RuntimeError(f"{module} failed ({ran.returncode}) for {case}:\n{(ran.stdout + ran.stderr)[-4000:]}")
        return json.loads(answer.read_bytes())


def check_kernels(*settings: str) -> None:
    """Raises UserError for a setting of the kernels that cannot be, before a child is asked for it."""
    from kernels import dispatch

    for setting in settings:
        try:
            modes = dispatch.parse(setting)
        except ValueError as problem:
            raise UserError(str(problem)) from None
        if (mode := modes.get("flash_attention")) in dispatch.FURTHER["flash_attention"]:
            raise UserError(f"--kernels flash_attention={mode} is a library's, whose launches are not known here")


def child_case() -> Case:
    """A child's case. It collects no garbage, which would be a fifth of its time."""
    gc.disable()
    return Case(**json.loads(sys.argv[1]))


def child_ends(answer: Any) -> NoReturn:
    """A child's last act: it leaves its answer, and its objects where they are; freeing them takes seconds."""
    Path(sys.argv[2]).write_text(json.dumps(answer))
    end_at_once(None)


@dataclass
class Prepared:
    """A program ready to be run under `fake`. `graphs` fills as they are compiled: once, in the first step."""

    case: Case
    program: "Program"
    fake: Any
    graphs: list[Graph]
    returned: list[Callable[[str, Any], None]]  # called with the name of each graph that has run, and what it returned
    launched: list[Callable[[str, str, Sequence[Any]], None]]  # with each launch's name, Triton source or "", arguments
    written: list[Callable[[str, str], None]]  # with the name and source of each Triton kernel, as it is generated

    def step(self, mark: Callable[[str], None] = lambda phase: None) -> None:
        """One of the program's; `mark` is told what begins."""
        self.program.step(mark)


def prepared(case: Case) -> Prepared:
    """The program of a case on fake tensors of this process's null device, its compiled parts not yet run."""
    from torch._subclasses import FakeTensorMode

    from profiling.compiled import programs

    graphs: list[Graph] = []
    returned: list[Callable[[str, Any], None]] = []
    launched: list[Callable[[str, str, Sequence[Any]], None]] = []
    written: list[Callable[[str, str], None]] = []
    stub_inductor(graphs, returned, launched, written, case.device)
    if case.device == "cuda":
        stub_kernels()
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    return Prepared(case, programs.made(case, fake), fake, graphs, returned, launched, written)


def stub_kernels() -> None:
    """No kernel gives an answer on a null device: `auto` takes those that it would take if all were right.

    And torch's attention is what the CUDA build would choose; the CPU wheel has only the plain products.
    """
    import torch.nn.functional as F

    from kernels import probing

    probing.check = lambda *args: None  # type: ignore[assignment]
    F.scaled_dot_product_attention = _cuda_attention  # type: ignore[assignment]


def _cuda_attention(
    q: Any, k: Any, v: Any, mask: Any = None, dropout: float = 0.0, is_causal: bool = False, scale: Any = None,
    enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """FlashAttention where there is no mask, else the memory-efficient kernel, for which a mask is added to scores."""
    import torch

    aten = torch.ops.aten
    if mask is None:
        return aten._scaled_dot_product_flash_attention(q, k, v, dropout, is_causal, False, scale=scale)[0]
    if enable_gqa and q.size(1) != k.size(1):
        k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, float("-inf"))
    bias = bias.expand(q.size(0), q.size(1), q.size(2), k.size(2))
    return aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, dropout, False, scale=scale)[0]


def _empty_strided(device: str, size: Any, stride: Any, dtype: Any) -> Any:
    import torch

    return torch.empty_strided(size, stride, dtype=dtype, device=device)


def _reinterpret(x: Any, size: Any, stride: Any, offset: int) -> Any:
    return x.as_strided(size, stride, x.storage_offset() + offset)


class _Libraries:
    """Stands for cuBLAS and the like, which write where the wrapper says."""

    def __init__(self, launched: list[Any]) -> None:
        self.launched = launched

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(*args: Any, out: Any, **options: Any) -> None:
            for note in self.launched:
                note(name, "", (*args, out))

        return call


class _Kernel:
    """Stands for a generated kernel."""

    def __init__(self, name: str, source: str, launched: list[Any]) -> None:
        self.name, self.source, self.launched = name, source, launched

    def __call__(self, *args: Any) -> None:
        self.run(*args)

    def run(self, *args: Any, **options: Any) -> None:
        for note in self.launched:
            note(self.name, self.source, args)


def _numbered(traces: dict[str, list[str]], nodes: Any, name: str, is_extern: bool = False) -> int:
    """Stands for Inductor's own bookkeeping: gives a launch a number, and notes the lines whose work it does."""
    number = 1 + max(map(int, traces), default=0)
    made = [nodes] if is_extern else [node.node for node in nodes if getattr(node, "node", None) is not None]
    traces[str(number)] = [trace for node in made for trace in node.get_stack_traces()]
    return number


def stub_inductor(
    graphs: list[Graph],
    returned: list[Callable[[str, Any], None]],
    launched: list[Callable[[str, str, Sequence[Any]], None]],
    written: list[Callable[[str, str], None]],
    target: str,
) -> None:
    """Generated kernels are not compiled, and generated wrappers allocate through torch's dispatcher.

    What Inductor would compute or measure on the card itself is done on the CPU, or left out: constants are folded
    there, and products are not padded (it would try what is faster; here that concerns products of the gates only).
    """
    import torch
    import torch._dynamo.config
    import torch._functorch.config
    from torch._inductor import async_compile, config, debug
    from torch._inductor import graph as lowering
    from torch._inductor.codegen import triton
    from torch._inductor.codegen.simd_kernel_features import SIMDKernelFeatures
    from torch._inductor.dtype_propagation import DtypePropagationOpsHandler
    from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
    from torch._subclasses import FakeTensor, FakeTensorMode
    from torch.fx import GraphModule
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from profiling.compiled.forked import Forward, fork_forward

    # A float, as of the optimizer's scalars, is 0.5; a bool, that a sum is finite, True; an integer, found_inf, 0.
    FakeTensor.item = lambda self: 0.5 if self.is_floating_point() else self.dtype == torch.bool  # type: ignore
    Mode: Any = FakeTensorMode
    Folder: Any = UniformValueConstantFolder
    Lowering: Any = lowering.GraphLowering
    Module: Any = GraphModule
    Types: Any = DtypePropagationOpsHandler
    Shapes: Any = ShapeEnv
    Features: Any = SIMDKernelFeatures
    config.fx_graph_cache = False
    config.compile_threads = 1
    config.shape_padding = False
    config.profile_bandwidth = True  # sources say how many bytes their kernels move
    accesses = Features.buf_accesses

    def accesses_by_real_name(self: Any) -> dict[str, list[Any]]:
        """A buffer that an operator changed in place has another name from then on, by which Inductor counts none."""
        real = lowering.V.graph.scheduler.mutation_real_name
        found: dict[str, list[Any]] = {}
        for name, dependencies in accesses(self).items():
            found.setdefault(real.get(name, name), []).extend(dependencies)
        return found

    Features.buf_accesses = accesses_by_real_name
    Mode.avoid_device_init = property(lambda self: True)
    torch._functorch.config.force_non_lazy_backward_lowering = True  # at once, while a forked process lowers forward
    # These change nothing but the time.
    torch._dynamo.config.run_gc_after_compile = False
    Module.print_readable = lambda self, *args, **options: ""  # for torch's own logs
    Types.__init__ = cache(Types.__init__)  # a singleton's, run again for every op
    evaluate = Shapes.evaluate_symexpr
    # Strides that are plain numbers need none of the symbols, which are otherwise printed for each.
    Shapes.evaluate_symexpr = lambda self, code: int(code) if code.isdecimal() else evaluate(self, code)

    def triton_kernel(name: str, source: str) -> _Kernel:
        for callback in written:
            callback(name, source)
        return _Kernel(name, source, launched)

    AsyncCompile: Any = async_compile.AsyncCompile
    AsyncCompile.triton = lambda self, name, source, **options: triton_kernel(name, source)
    # For a GPU these pack the optimizer's scalars, on the CPU: nothing is launched.
    of_cpu = launched if target == "cpu" else []
    AsyncCompile.cpp_pybinding = lambda self, types, source, *more, **options: _Kernel("", source, of_cpu)
    traces: dict[str, list[str]] = {}
    for module in (debug, triton):
        module.set_kernel_post_grad_provenance_tracing = partial(_numbered, traces)  # type: ignore[attr-defined]
    fetch, deduce, build = Folder.fetch_args_kwargs_from_env, Folder._deduce_value, Lowering.compile_to_module

    def on_cpu(self: Any, node: Any) -> tuple[Any, dict[str, Any]]:
        args, options = fetch(self, node)
        return args, {**options, "device": torch.device("cpu")} if options.get("device") is not None else options

    def full_on_cpu(self: Any, node: Any) -> Any:
        if node.target is torch.ops.aten.full.default:
            return node.target([1], node.args[1], **{**node.kwargs, "device": "cpu"})
        return deduce(self, node)

    def finished(module: Any, name: str, inputs: list[str], launches: dict[str, list[str]]) -> Any:
        """A wrapper's module with what it calls replaced; its graph is noted."""
        for device in ("cuda", "cpu"):
            setattr(module, f"empty_strided_{device}", partial(_empty_strided, device))
        module.reinterpret_tensor = _reinterpret
        module.extern_kernels = _Libraries(launched)
        module.get_raw_stream = lambda index: 0
        for kernel, value in vars(module).items():
            if isinstance(value, _Kernel):
                value.name = kernel
        module.assert_size_stride = module.assert_alignment = lambda *args: None
        made = Graph(name, module.__file__, Path(module.__file__).read_text("utf-8"), inputs, launches)
        graphs.insert(0 if name == "forward" else len(graphs), made)  # which may be loaded after backward was lowered
        call = module.call

        def observed(args: list[Any]) -> Any:
            out = call(args)
            for callback in returned:
                callback(name, out)
            return out

        module.call = observed
        return module

    def built(self: Any) -> Any:
        name = "backward" if self.is_backward else "inference" if self.is_inference else "forward"
        module = finished(build(self), name, list(self.graph_input_names), dict(traces))
        traces.clear()
        return module

    def forward(module: Any, made: Forward) -> Any:
        return finished(module, "forward", made.inputs, made.traces)

    def begin_again() -> NoReturn:
        raise SystemExit(OTHER_STRIDES)

    Folder.fetch_args_kwargs_from_env, Folder._deduce_value = on_cpu, full_on_cpu
    Lowering.compile_to_module = built
    if IN_TURN not in os.environ and sys.platform == "linux":
        fork_forward(forward, traces, begin_again)


def main() -> None:
    """The graphs of a case, as JSON."""
    ready = prepared(child_case())
    with ready.fake:
        ready.step()
    child_ends([asdict(graph) for graph in ready.graphs])


if __name__ == "__main__":
    main()
