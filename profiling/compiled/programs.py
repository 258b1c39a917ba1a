"""What is run on the null device, on fake tensors: a training step (ours, or plain.py's), a decode step, a prefill.

Each function builds a model and returns a `Program`: its steps, and what they find in memory. Everything is as the
training loop and the engine have it on CUDA. A step of several ranks is what rank 0 does of it: torch's fake process
group stands for NCCL, and its collectives return at once.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import kernels
from profiling.compiled.case import PLAIN, Case

Mark = Callable[[str], None]


@dataclass
class Program:
    """step: takes one, telling `mark` what begins. held: kind → tensors that are there before it."""

    model: Any
    step: Callable[[Mark], None]
    held: Callable[[], dict[str, Iterable[Tensor]]]
    optimizer: Any = None
    ids: Any = None  # (rows, T) int64: tokens and targets


def made(case: Case, fake: Any) -> Program:
    """The program that a case asks for, with fake tensors of `fake`."""
    if case.gpus > 1:
        join_ranks(case.gpus)
    part = plain_training if case.kernels == PLAIN else dict(step=training, decode=decode, prefill=prefill)[case.part]
    return part(case, fake, torch.device(case.device))


def join_ranks(world: int) -> None:
    """This process is rank 0 of so many; the others are not there."""
    import torch.distributed as dist
    from torch.distributed._tools import fake_collectives  # noqa: F401  gives collectives their shape functions
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)


def our_model(case: Case, fake: Any, device: torch.device) -> Any:
    """Of fake tensors on the device. It is cast on meta: fake parameters cannot be in place."""
    from nanochat.gpt import GPT, GPTConfig

    with torch.device("meta"):
        model = GPT(GPTConfig(**case.config))
    model.set_dtype(getattr(torch, case.dtype))
    if case.part != "step":
        model.to(model.dtype)
        model.to = lambda dtype: model  # type: ignore  # has nothing left to do
    with fake:
        return model.to_empty(device=device)


def training(case: Case, fake: Any, device: torch.device) -> Program:
    """The training loop's step, with what is kept and cast once, and the optimizer."""
    from nanochat import optim, trainer

    optim.Late = lambda values: None  # type: ignore  # there is nothing to be read
    model = our_model(case, fake, device)
    with fake:
        if case.fp8:
            model.set_fp8(case.fp8)
        optimizer = model.setup_optimizer()
        hardware = SimpleNamespace(device=device)
        run = trainer.runnable(SimpleNamespace(hardware=hardware, model=model, optimizer=optimizer, compile=False))  # type: ignore[arg-type]
        optimizer.compile()

    def held() -> dict[str, Iterable[Tensor]]:
        shadows = [copy for _, copy in optimizer._shadows]
        return dict(shadows=shadows) | {"gradients kept": optimizer._kept, "moments": moments(optimizer)}

    return steps(case, fake, model, optimizer, run, held, loss_reduction="sum")


def plain_training(case: Case, fake: Any, device: torch.device) -> Program:
    """The baseline's."""
    from profiling.compiled import plain

    with fake, device:
        model = plain.GPT(case.config, getattr(torch, case.dtype))
        optimizer = plain.MuonAdamW(model)
    return steps(case, fake, model, optimizer, model, lambda: dict(moments=moments(optimizer)))


def moments(optimizer: Any) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def steps(case: Case, fake: Any, model: Any, optimizer: Any, run: Any, more: Callable[[], dict], **how: Any) -> Program:
    """One optimizer step of two micro-batches; `run` is compiled."""
    compiled = torch.compile(run, dynamic=False, fullgraph=True)
    with fake:
        ids = torch.zeros((case.rows, case.config["sequence_len"]), dtype=torch.int64, device=case.device)

    def step(mark: Mark) -> None:
        with kernels.use("auto" if case.kernels == PLAIN else case.kernels):
            for micro in range(1, 3):
                mark(f"forward {micro}")
                loss = compiled(ids, ids, **how) / 2
                mark(f"backward {micro}")
                loss.backward()
                del loss
            mark("optimizer")
            if case.optimizer:
                optimizer.step()
            optimizer.zero_grad()

    def held() -> dict[str, Iterable[Tensor]]:
        return dict(batch=[ids], parameters=model.parameters(), buffers=model.buffers()) | more()

    return Program(model, step, held, optimizer, ids)


def decode(case: Case, fake: Any, device: torch.device) -> Program:
    """The engine's: one more token for each row, all rows' caches full; without sampling, which is the host's."""
    from nanochat.engine.engine import Engine

    model = our_model(case, fake, device)
    with fake, torch.no_grad():
        engine = Engine(model, slots=case.rows)
        engine._decode.problem = "run as it is captured"  # type: ignore[union-attr]

    def step(mark: Mark) -> None:
        with kernels.use(case.kernels), torch.no_grad():
            mark("decode")
            engine.slots.lengths = [case.config["sequence_len"] - 1] * case.rows
            engine._decode([0] * case.rows)

    return Program(engine.model, step, lambda: cached(engine))


def prefill(case: Case, fake: Any, device: torch.device) -> Program:
    """The engine's: a prompt of half the context into an empty slot, at once, beside rows that wait."""
    from nanochat.engine.engine import Engine
    from nanochat.engine.sampling import Sampling
    from nanochat.engine.scheduler import Chunk, Request

    prompt = [0] * (case.config["sequence_len"] // 2)
    model = our_model(case, fake, device)
    with fake, torch.no_grad():
        engine = Engine(model, slots=case.rows)

    def step(mark: Mark) -> None:
        with kernels.use(case.kernels), torch.no_grad():
            mark("prefill")
            engine.slots.lengths[0] = 0
            engine._prefill(Chunk(Request(prompt, 1, Sampling()), 0, prompt))

    return Program(engine.model, step, lambda: cached(engine))


def cached(engine: Any) -> dict[str, Iterable[Tensor]]:
    slots = engine.slots
    return dict(
        parameters=engine.model.parameters(), buffers=engine.model.buffers(), cache=[slots.k, slots.v, slots.previous]
    )
