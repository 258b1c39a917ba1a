"""Every op under torch.compile(fullgraph=True, dynamic=True), as in other people's models: one graph takes every size.

By default Dynamo traces and eager runs what it found; AOTAutograd and Inductor by name.
"""

import pytest
import torch
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx

import kernels
from kernels import OPS, triton_utils
from kernels.registry import tensors
from kernels.triton_utils import chunk_ranges

needs_triton = pytest.mark.skipif(not triton_utils.INSTALLED, reason="Triton is not installed, so no kernel can run")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The block of a norm's kernel is the next power of two, of which each has a graph: widths between two of them.
ROWS = [dict(N=5, C=40), dict(N=7, C=48), dict(N=11, C=56)]
MLP = [dict(N=5, C=16, F=48), dict(N=7, C=32, F=64), dict(N=11, C=48, F=80)]
HEADS = [dict(B=B, T=T, H=4, K=2, D=16) for B, T in ((3, 5), (5, 7), (7, 11))]
MATRICES = [dict(K=3, m=8, n=12), dict(K=2, m=10, n=14), dict(K=4, m=5, n=18)]
SIZES = {
    "rms_norm": ROWS,
    "mix_rms_norm": ROWS,
    "add_rms_norm": ROWS,
    "fp8_mix_rms_norm": ROWS,
    "fp8_add_rms_norm": ROWS,
    "rotary": HEADS,
    "qk_norm_rotary": HEADS,
    "cross_entropy": [dict(N=5, V=33), dict(N=7, V=50), dict(N=11, V=64)],
    "linear_cross_entropy": [dict(N=5, V=33, C=16), dict(N=7, V=50, C=16), dict(N=11, V=64, C=16)],
    "linear_relu2": MLP,
    "mlp_relu2": MLP,
    "fp8_linear": MLP,
    "fp8_mlp_relu2": MLP,
    "flash_attention": [dict(B=B, T=T, H=4, K=2, D=16, W=9) for B, T in ((3, 150), (5, 170), (6, 190))],
    "flash_attention_decode": [dict(B=B, Tq=2, S=S, H=4, K=2, D=16, W=9) for B, S in ((3, 21), (5, 30), (7, 41))],
    "embedding": [dict(N=5, V=33, C=16), dict(N=7, V=50, C=24), dict(N=11, V=64, C=40)],
    "polar_express": MATRICES,
    "newton_schulz": MATRICES,
    "adamw_": [dict(N=30), dict(N=50), dict(N=77)],
    "muon_momentum_": MATRICES,
    "muon_update_": MATRICES,
}


def every_second(value):
    """The same values with others between them, in memory."""
    wide = value.new_zeros(*value.shape[:-1], 2 * value.shape[-1])
    wide[..., ::2] = value
    return wide[..., ::2]


def turned(value):
    """The same values, in memory with the dimensions in reverse: the last one has the longest stride."""
    return value.permute(*reversed(range(value.ndim))).contiguous().permute(*reversed(range(value.ndim)))


def expanded(value):
    """The second of them everywhere, in memory once. (Of targets, the first is one to ignore.)"""
    return value[1:2].expand(value.shape)


LAYOUTS = (every_second, turned, expanded)


def inputs_of(op, case, lay=None, marked=(), in_place=True):
    """lay: how tensors lie in memory, in_place: also those that are changed; marked: cases whose shapes differ in the
    dimensions that are marked dynamic.
    """
    inputs = op.inputs(case, torch.float32, DEVICE)
    shapes = [op.inputs(other, torch.float32, "meta") for other in marked]
    for name, value in inputs.items():
        if not torch.is_tensor(value) or not value.ndim:
            continue
        if lay and (name not in op.mutates or (in_place and lay is not expanded)):
            inputs[name] = value = lay(value)
        for dim in range(value.ndim if shapes else 0):
            if len({other[name].shape[dim] for other in shapes}) > 1:
                torch._dynamo.mark_dynamic(value, dim)
    for name in op.differentiable:
        inputs[name].requires_grad_()
    return inputs


def results(fn, op, inputs, setting):
    """Outputs, arguments changed in place, gradients."""
    with kernels.use(setting):
        result = fn(**inputs)
        outputs = [output for output in tensors(result) if output.requires_grad]
        if outputs:
            sum(output.float().square().sum() for output in outputs).backward()
    return [
        *tensors(result),
        *(inputs[name] for name in op.mutates),
        *(inputs[name].grad for name in op.differentiable),
    ]


def check(name, setting, backend, sizes, looked_up=False, lay=None, marked=False):
    """`looked_up`: a width that is asked for in a table is a constant of the graph, so each has one of its own."""
    op = OPS[name]
    in_place = "triton" not in setting  # kernels refuse to change in place what is not contiguous
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(op.fn, fullgraph=True, dynamic=None if marked else True, backend=backend)
    for case in sizes:
        found = results(compiled, op, inputs_of(op, case, lay, sizes if marked else (), in_place), setting)
        plain = inputs_of(op, case, expanded if lay is expanded else None)
        for key, value in plain.items():
            if torch.is_tensor(value):
                plain[key] = value.detach().contiguous().requires_grad_(value.requires_grad)
        for a, b in zip(found, results(op.fn, op, plain, setting), strict=True):
            assert (a.double() - b.double()).norm() <= 1e-3 * b.double().norm() + 1e-6
    assert counters["stats"]["unique_graphs"] <= (len(sizes) if looked_up else 1)


@pytest.mark.parametrize("name", OPS)
def test_one_graph_takes_every_size(name):
    check(name, "torch", "eager", SIZES[name][:2], looked_up=DEVICE == "cuda")


QUICK = [pytest.param(name, marks=pytest.mark.slow if name == "flash_attention" else ()) for name in OPS]


@pytest.mark.parametrize("name", QUICK)
def test_tensors_may_lie_anyhow(name):
    check(name, "torch", "eager", SIZES[name][:1], lay=turned)


@pytest.mark.parametrize("name", QUICK)
def test_a_dimension_that_is_marked_stays_dynamic(name):
    check(name, "torch", "eager", SIZES[name][:2], marked=True)


@needs_triton
def test_a_vocabulary_may_change_in_linear_cross_entropys_kernels():
    name = "linear_cross_entropy"
    check(name, f"torch,{name}=triton", "eager", SIZES[name][:1])


@pytest.mark.parametrize("name", ["fp8_mix_rms_norm", "fp8_add_rms_norm"])
def test_a_width_stays_a_symbol_when_traced_without_dynamo(name):
    op, (small, large) = OPS[name], SIZES[name][:2]

    def values(case):
        return [value for value in op.inputs(case, torch.float32, DEVICE).values() if torch.is_tensor(value)]

    with kernels.use("torch"):
        traced = make_fx(lambda *args: tensors(op.fn(*args)), tracing_mode="symbolic")(*values(small))
        for a, b in zip(traced(*values(large)), tensors(op.fn(*values(large)))):
            assert torch.equal(a.double(), b.double())


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", OPS)
def test_compiled_it_gives_the_same_at_every_size(name, backend):
    check(name, "auto", backend, SIZES[name], looked_up=DEVICE == "cuda")


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("name", [op.name for op in OPS.values() if op.triton])
def test_the_kernels_take_every_size(name):
    check(name, f"torch,{name}=triton", "aot_eager", SIZES[name], looked_up=name == "linear_cross_entropy")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("name", OPS)
def test_compiled_tensors_may_lie_anyhow(name, backend):
    """In each way, and with their dimensions marked."""
    for lay in LAYOUTS if backend == "eager" else (turned,):
        check(name, "auto", backend, SIZES[name][:2], looked_up=DEVICE == "cuda", lay=lay)
    check(name, "torch", backend, SIZES[name][:2], lay=turned, marked=True)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("name", [op.name for op in OPS.values() if op.triton])
def test_the_kernels_take_tensors_that_lie_anyhow(name):
    check(name, f"torch,{name}=triton", "aot_eager", SIZES[name][:1], lay=turned)


def test_chunks_are_a_power_of_two_equal_and_short_enough():
    for start, end, longest in ((0, 0, 4), (3, 3, 4), (0, 4, 4), (0, 5, 4), (2, 2051, 128), (0, 4225, 34), (0, 7, 1)):
        found = chunk_ranges(start, end, longest)
        assert [i for first, last in found for i in range(first, last)] == list(range(start, end))
        assert all(0 < last - first <= longest for first, last in found)
        assert len({last - first for first, last in found[:-1]}) <= 1
    for end, longest in ((100, 64), (104, 64), (256, 64), (2049, 64), (2049, 256), (15, 64)):
        found = chunk_ranges(0, end, longest, 16)
        assert [i for first, last in found for i in range(first, last)] == list(range(end))
        assert all(first % 16 == 0 and last - first <= longest for first, last in found)
