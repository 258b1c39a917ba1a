"""Run on two cards of the computing null device: it does what a GPU does, where a program could tell the difference."""

import threading
import time

import torch
from torch._subclasses import FakeTensorMode


def refused(call, words):
    try:
        call()
    except RuntimeError as problem:
        assert words in str(problem), problem
        return
    raise AssertionError(f"not refused: {words}")


assert torch.cuda.is_available() and torch.cuda.device_count() == 2
assert torch.cuda.get_device_name(1) == "NVIDIA H100 80GB HBM3" and torch.cuda.get_device_capability() == (9, 0)

# Values and gradients are the CPU's; tensors of two devices do not meet.
x = torch.arange(20.0, device="cuda").view(4, 5)
w = torch.randn(5, 3, device="cuda", requires_grad=True)
(x @ w).square().sum().backward()
copy = w.detach().cpu().requires_grad_()
(x.cpu() @ copy).square().sum().backward()
assert w.grad.is_cuda and torch.equal(w.grad.cpu(), copy.grad)
refused(lambda: x + x.cpu(), "cuda:0 and cpu")
refused(lambda: x + x.to("cuda:1"), "cuda:0 and cuda:1")
assert (x + torch.tensor(1.0))[0, 0] == 1  # a number may come from the CPU
x[1:3].zero_()  # a view is a view
assert x[:, 0].tolist() == [0, 0, 0, 15] and x.view(-1).data_ptr() == x.data_ptr()
out = torch.empty(0, device="cuda")
torch.add(x, x, out=out)
assert out.shape == x.shape and torch.equal(out, x + x)
with torch.inference_mode():
    x[0] = 7
assert x[0, 0].item() == 7
assert torch.empty(3, device="cuda").isnan().all()  # never written

# What is only on GPUs.
a, b = torch.randn(16, 16, device="cuda").bfloat16(), torch.randn(16, 16, device="cuda").bfloat16()
total = torch.ones(a.size(0), b.size(1), device=a.device)
torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
assert torch.equal(total, 1 + a.float() @ b.float())
small, one = a.to(torch.float8_e4m3fn), torch.ones((), device="cuda")
torch._scaled_mm(small, small.t(), one, one, out_dtype=torch.bfloat16)
refused(lambda: torch._scaled_mm(small, small, one, one, out_dtype=torch.bfloat16), "column-major")

# Generators are the device's own.
torch.manual_seed(1)
first = torch.rand(3, device="cuda")
torch.manual_seed(1)
torch.rand(3)
assert torch.equal(first, torch.rand(3, device="cuda"))

# A copy that need not have happened has not, until somebody waits.
pinned = torch.zeros(20, pin_memory=True)
assert pinned.is_pinned() and not torch.zeros(3).is_pinned()
pinned.copy_(torch.ones(20, device="cuda"), non_blocking=True)
event = torch.cuda.Event()
event.record()
assert pinned.isnan().all()
event.synchronize()
assert (pinned == 1).all()
late = pinned.to("cuda", non_blocking=True)
pinned.fill_(2)  # too early
assert (late == 2).all()

# Memory is counted, each device's for itself.
before = torch.cuda.memory_allocated(1)
torch.cuda.reset_peak_memory_stats(1)
kept = torch.empty(1000, device="cuda:1")
kept = None
assert torch.cuda.memory_allocated(1) == before and torch.cuda.max_memory_allocated(1) == before + 4000
assert torch.cuda.mem_get_info(1) == (torch.cuda.get_device_properties(1).total_memory - before,) * 2

# A graph: nothing happens while it is captured; at each replay all does; waiting is refused.
state, graph = torch.zeros(3, device="cuda"), torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    state += 1
    double = state * 2
assert state.tolist() == [0, 0, 0] and double.isnan().all()
graph.replay()
graph.replay()
assert state.tolist() == [2, 2, 2] and double.tolist() == [4, 4, 4]


def capture(call):
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        call()


refused(lambda: capture(lambda: state.sum().item()), "when stream is capturing")
refused(lambda: capture(torch.cuda.synchronize), "when stream is capturing")
refused(lambda: capture(lambda: state.copy_(torch.ones(3))), "not pinned")
refused(lambda: torch.cuda.CUDAGraph().capture_begin(), "non-default stream")

# The current device and stream are a thread's own.
seen = []
torch.cuda.set_device(1)
thread = threading.Thread(target=lambda: seen.append(torch.cuda.current_device()))
thread.start()
thread.join()
assert seen == [0] and torch.empty(1, device="cuda").device.index == 1
with torch.cuda.stream(torch.cuda.Stream()) as _:
    assert torch.cuda.current_stream().cuda_stream
assert not torch.cuda.current_stream().cuda_stream

# Fake tensors have autograd and torch.compile.
with FakeTensorMode():
    w = torch.empty(5, 3, device="cuda", requires_grad=True)
    torch.compile(lambda x: (x @ w).sum(), fullgraph=True)(torch.empty(4, 5, device="cuda")).backward()
    assert w.grad.is_cuda
print("the device: as wanted")
# Autograd's thread may still be letting go of the graph: Python that ends under it is aborted.
time.sleep(0.2)
