"""A step of the training loop, compiled and run on this CPU, as torch's profiler records it; a case as JSON, and where
the answer goes: [phase, operator, bytes of its tensors] of each operator that runs by itself, and the peak of memory.
"""

from types import SimpleNamespace

import torch
from torch._inductor import config as inductor

from nanochat import trainer
from nanochat.gpt import GPT, GPTConfig
from profiling.compiled import lower

inductor.cpp.enable_kernel_profile = True  # generated kernels are events
PHASES = ("forward 1", "backward 1", "forward 2", "backward 2", "optimizer")
DTYPES = dict(float=4, long=8, int=4, bool=1, **{"c10::BFloat16": 2, "long int": 8, "double": 8})
Event = torch._C._autograd._KinetoEvent


def composite(name: str) -> bool:
    """Whether an operator of ATen's only calls others, which are what is dispatched."""
    packet = getattr(torch.ops.aten, name.removeprefix("aten::"), None) if name.startswith("aten::") else None
    known = [f"{name}.{overload}".removesuffix(".default") for overload in packet.overloads()] if packet else []
    known = [overload for overload in known if torch._C._dispatch_has_kernel(overload)]
    key = "CompositeImplicitAutograd"
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(overload, key) for overload in known)


def operators(events: list[Event]) -> list[Event]:
    """Those that no other operator called."""
    found, end = [], 0
    for event in events:
        known = event.name().startswith(("graph_", "aten::", "kernels::"))
        if known and event.start_ns() >= end and not composite(event.name()):
            found.append(event)
            end = event.end_ns()
    return found


def size(event: Event) -> int:
    """Bytes of an operator's tensors."""
    total = 0
    for shape, dtype in zip(event.shapes(), event.dtypes()):
        total += DTYPES.get(dtype, 0) * torch.Size(shape).numel() if shape else 0
    return total


case = lower.child_case()
config = GPTConfig(**case.config)
torch.manual_seed(0)
model = GPT(config)
model.init_weights()
optimizer = model.setup_optimizer()
hardware = SimpleNamespace(device=torch.device("cpu"))
run = trainer.runnable(SimpleNamespace(hardware=hardware, model=model, optimizer=optimizer, compile=True))  # type: ignore
ids = torch.randint(config.vocab_size, (case.rows, config.sequence_len))


def step() -> None:
    for micro in (1, 2):
        with torch.profiler.record_function(f"forward {micro}"):
            loss = run(ids, ids, loss_reduction="sum") / 2
        with torch.profiler.record_function(f"backward {micro}"):
            loss.backward()
        del loss
    with torch.profiler.record_function("optimizer"):
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


step()
moments = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in [*model.parameters(), *model.buffers(), ids, *moments]}  # fmt: skip
total = most = sum(storages.values())
activities = [torch.profiler.ProfilerActivity.CPU]
with torch.profiler.profile(activities=activities, profile_memory=True, record_shapes=True) as profile:
    step()
events = sorted(profile.profiler.kineto_results.events(), key=lambda event: (event.start_ns(), -event.duration_ns()))
for event in events:
    if event.name() == "[memory]":
        total += event.nbytes()
        most = max(most, total)
launches = []
for phase in [event for event in events if event.name() in PHASES]:
    inside = [event for event in events if phase.start_ns() <= event.start_ns() < phase.end_ns()]
    launches += [(phase.name(), event.name(), size(event)) for event in operators(inside)]
lower.child_ends(dict(launches=launches, peak=most))
