"""The training step as Inductor would compile it for a card that is not here, run line by line on fake tensors.

On the null device (null_device.py) `torch.compile` goes its whole way: Dynamo, AOTAutograd with its partitioner,
Inductor's passes, its scheduler, the generated wrapper. Only the generated Triton kernels are not compiled. The wrapper
then runs on fake CUDA tensors: every allocation, reuse and free happens in its order, every launch does nothing. So
memory.py can count the bytes of a whole step, and whoever wants to read the code has it in `graphs`.

`prepared` is for a process with the null device; `ask` starts one and reads its JSON. The model, what is kept and cast
once, and the optimizer are as the training loop has them on CUDA.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from profiling.compiled import null_device

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Case:
    """What is trained: `config` as GPTConfig's fields. fp8: "", "current" or "delayed"; kernels as NANOCHAT_KERNELS."""

    config: dict[str, Any]
    rows: int  # of a micro-batch
    dtype: str = "bfloat16"
    fp8: str = ""
    kernels: str = "auto"
    optimizer: bool = True  # whether its updates are compiled and made too


@dataclass
class Graph:
    """One compiled graph: the wrapper that Inductor wrote, with the Triton sources."""

    name: str  # forward, backward, inference (an optimizer's update)
    path: str  # of the file that the code is in
    code: str
    inputs: list[str]  # names in the code, in the order of arguments
    places: dict[str, list[str]]  # a launch's number, as in the comment above it → stack traces of what it computes


def ask(module: str, case: Case, card: str) -> Any:
    """Runs `python -m module` with a case on the null device of a card; returns the JSON that it leaves.

    Raises UserError where there can be no null device, RuntimeError with the child's last lines when it fails.
    """
    null_device.library()
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        environment = dict(null_device.environment(card, 1), TORCHINDUCTOR_CACHE_DIR=folder, OMP_NUM_THREADS="1")
        for name in ("TRITON_INTERPRET", "NANOCHAT_KERNELS"):
            environment.pop(name, None)
        command = [sys.executable, "-m", module, json.dumps(asdict(case)), str(answer)]
        ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        if ran.returncode or not answer.exists():
            raise RuntimeError(f"{module} failed ({ran.returncode}) for {case}:\n{(ran.stdout + ran.stderr)[-4000:]}")
        return json.loads(answer.read_bytes())


def child_case() -> tuple[Case, Path]:
    """A child's case, and where its answer goes."""
    return Case(**json.loads(sys.argv[1])), Path(sys.argv[2])


@dataclass
class Prepared:
    """A step ready to be taken under `fake`. `graphs` fills as they are compiled: once, in the first step."""

    case: Case
    model: Any
    optimizer: Any
    run: Any  # the compiled model
    ids: Any  # (rows, T) int64: tokens and targets
    fake: Any
    graphs: list[Graph]
    returned: list[Callable[[str, Any], None]]  # called with the name of each graph that has run, and what it returned
    launched: list[Callable[[str, str, Sequence[Any]], None]]  # with each launch's name, Triton source or "", arguments

    def step(self, mark: Callable[[str], None] = lambda phase: None) -> None:
        """One optimizer step of the training loop, of two micro-batches; `mark` is told what begins."""
        import kernels

        with kernels.use(self.case.kernels):
            for micro in range(1, 3):
                mark(f"forward {micro}")
                loss = self.run(self.ids, self.ids, loss_reduction="sum") / 2
                mark(f"backward {micro}")
                loss.backward()
                del loss
            mark("optimizer")
            if self.case.optimizer:
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def prepared(case: Case) -> Prepared:
    """Model and optimizer on fake tensors of this process's null device, and the compiled step, not yet run."""
    from types import SimpleNamespace

    import torch
    from torch._subclasses import FakeTensorMode

    from nanochat import optim, trainer
    from nanochat.gpt import GPT, GPTConfig

    optim.Late = lambda values: None  # type: ignore  # there is nothing to be read
    graphs: list[Graph] = []
    returned: list[Callable[[str, Any], None]] = []
    launched: list[Callable[[str, str, Sequence[Any]], None]] = []
    stub_inductor(graphs, returned, launched)
    stub_kernels()
    dtype = getattr(torch, case.dtype)
    config = GPTConfig(**case.config)
    with torch.device("meta"):
        model = GPT(config)
    model.set_dtype(dtype)  # on meta: fake parameters cannot be cast in place
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    device = torch.device("cuda", 0)
    with fake:
        model.to_empty(device=device)
        if case.fp8:
            model.set_fp8(case.fp8)
        optimizer = model.setup_optimizer()
        run = trainer.runnable(
            SimpleNamespace(hardware=SimpleNamespace(device=device), model=model, optimizer=optimizer, compile=False)  # type: ignore[arg-type]
        )
        optimizer.compile()
        ids = torch.zeros((case.rows, config.sequence_len), dtype=torch.int64, device=device)
    compiled = torch.compile(run, dynamic=False, fullgraph=True)
    return Prepared(case, model, optimizer, compiled, ids, fake, graphs, returned, launched)


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
        pass

    def run(self, *args: Any, **options: Any) -> None:
        for note in self.launched:
            note(self.name, self.source, args)


def _place(places: dict[str, list[str]], nodes: Any, name: str, is_extern: bool = False) -> int:
    """Stands for Inductor's own bookkeeping: gives a launch a number, and notes the lines whose work it does."""
    number = 1 + max(map(int, places), default=0)
    made = [nodes] if is_extern else [node.node for node in nodes if getattr(node, "node", None) is not None]
    places[str(number)] = [trace for node in made for trace in node.get_stack_traces()]
    return number


def stub_inductor(
    graphs: list[Graph],
    returned: list[Callable[[str, Any], None]],
    launched: list[Callable[[str, str, Sequence[Any]], None]],
) -> None:
    """Generated kernels are not compiled, and generated wrappers allocate through torch's dispatcher.

    What Inductor would compute or measure on the card itself is done on the CPU, or left out: constants are folded
    there, and products are not padded (it would try what is faster; here that concerns products of the gates only).
    """
    import torch
    from torch._inductor import async_compile, config, debug, graph
    from torch._inductor.codegen import triton
    from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
    from torch._subclasses import FakeTensor, FakeTensorMode

    FakeTensor.item = lambda self: 0.5  # type: ignore  # of the optimizer's scalars, which kernels are handed
    Mode: Any = FakeTensorMode
    Folder: Any = UniformValueConstantFolder
    Lowering: Any = graph.GraphLowering
    config.fx_graph_cache = False
    config.compile_threads = 1
    config.shape_padding = False
    config.profile_bandwidth = True  # sources say how many bytes their kernels move
    Mode.avoid_device_init = property(lambda self: True)
    AsyncCompile: Any = async_compile.AsyncCompile
    AsyncCompile.triton = lambda self, name, source, **options: _Kernel(name, source, launched)
    # These pack the optimizer's scalars, on the CPU.
    AsyncCompile.cpp_pybinding = lambda self, *args, **options: _Kernel("pack", "", [])
    places: dict[str, list[str]] = {}
    for module in (debug, triton):
        module.set_kernel_post_grad_provenance_tracing = partial(_place, places)  # type: ignore[attr-defined]
    fetch, deduce, build = Folder.fetch_args_kwargs_from_env, Folder._deduce_value, Lowering.compile_to_module

    def on_cpu(self: Any, node: Any) -> tuple[Any, dict[str, Any]]:
        args, options = fetch(self, node)
        return args, {**options, "device": torch.device("cpu")} if options.get("device") is not None else options

    def full_on_cpu(self: Any, node: Any) -> Any:
        if node.target is torch.ops.aten.full.default:
            return node.target([1], node.args[1], **{**node.kwargs, "device": "cpu"})
        return deduce(self, node)

    def built(self: Any) -> Any:
        module = build(self)
        for device in ("cuda", "cpu"):
            setattr(module, f"empty_strided_{device}", partial(_empty_strided, device))
        module.reinterpret_tensor = _reinterpret
        module.extern_kernels = _Libraries(launched)
        module.get_raw_stream = lambda index: 0
        module.assert_size_stride = module.assert_alignment = lambda *args: None
        name = "backward" if self.is_backward else "inference" if self.is_inference else "forward"
        code = Path(module.__file__).read_text("utf-8")
        graphs.append(Graph(name, module.__file__, code, list(self.graph_input_names), dict(places)))
        places.clear()
        call = module.call

        def observed(args: list[Any]) -> Any:
            out = call(args)
            for tell in returned:
                tell(name, out)
            return out

        module.call = observed
        return module

    Folder.fetch_args_kwargs_from_env, Folder._deduce_value = on_cpu, full_on_cpu
    Lowering.compile_to_module = built


def main() -> None:
    """The graphs of a case, as JSON."""
    case, answer = child_case()
    ready = prepared(case)
    with ready.fake:
        ready.step()
    answer.write_text(json.dumps([asdict(graph) for graph in ready.graphs]))


if __name__ == "__main__":
    main()
