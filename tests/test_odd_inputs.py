"""What somebody else's code does to the ops: NaN and infinity, odd memory, autocast, inference mode, no rows."""

import math

import pytest
import torch

import kernels
from kernels import probing, triton_utils
from kernels.attention import backends
from kernels.registry import tensors

needs_triton = pytest.mark.skipif(not triton_utils.INSTALLED, reason="Triton is not installed, so no kernel can run")
BOTH = ["torch", pytest.param("triton", marks=needs_triton)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("setting", BOTH)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("window", [None, 7])
def test_attention_does_not_hide_nan(setting, bad, window):
    q, k, v = randn(1, 300, 2, 32), randn(1, 300, 1, 32, seed=1), randn(1, 300, 1, 32, seed=2)
    q[0, 5], k[0, 200] = bad, math.nan
    with kernels.use(f"torch,flash_attention={setting}"):
        rows = kernels.flash_attention(q, k, v, window=window).isnan().any(-1).any(-1)[0]
    assert rows[5] and rows[200 : 300 if window is None else 208].all()
    assert not rows[:5].any()
    assert setting == "torch" or not rows[6:200].any()  # PyTorch adds −∞ to NaN where a mask hides it


@pytest.mark.parametrize("setting", BOTH)
def test_relu2_does_not_hide_nan(setting):
    x, w1, w2 = randn(6, 16), randn(32, 16, seed=1), randn(16, 32, seed=2)
    x[1] = math.nan
    with kernels.use(f"torch,linear_relu2={setting},mlp_relu2={setting}"):
        for y in (kernels.linear_relu2(x, w1), kernels.mlp_relu2(x, w1, w2)):
            assert y[1].isnan().all() and not y[2:].isnan().any()


@needs_triton
def test_a_probe_works_within_inference_mode_and_autocast(monkeypatch):
    with torch.inference_mode(), torch.autocast(DEVICE, dtype=torch.bfloat16):
        probing.check("rms_norm", torch.bfloat16, 64, torch.device(DEVICE))
        working = backends.Backend("stand-in", "nowhere", (0, 99), 256, -1)
        monkeypatch.setitem(backends._FUNCTIONS, "stand-in", standing_in)
        backends._try(working, torch.bfloat16, 32, torch.device(DEVICE))


def standing_in(q, k, v, softmax_scale, causal, window_size):
    from kernels.attention.flash import flash_attention_reference

    return flash_attention_reference(q, k, v, causal, None if window_size[0] < 0 else window_size[0], softmax_scale)


def test_a_flash_attention_package_is_traced_whole(monkeypatch):
    monkeypatch.setitem(backends._FUNCTIONS, "fa3", standing_in)
    monkeypatch.setattr(backends, "obstacle", lambda backend, *rest: "" if backend.name == "fa3" else "not here")
    q, k, v = randn(1, 40, 2, 16), randn(1, 40, 1, 16, seed=1), randn(1, 40, 1, 16, seed=2)
    torch._dynamo.reset()
    with kernels.use("torch,flash_attention=fa3"):
        compiled = torch.compile(kernels.flash_attention, fullgraph=True, backend="eager")(q, k, v, window=5)
    with kernels.use("torch"):
        assert torch.allclose(compiled, kernels.flash_attention(q, k, v, window=5), atol=1e-6)


@needs_triton
def test_a_second_moment_may_lie_anyhow():
    param, update = randn(3, 20, 10), randn(3, 20, 10, seed=1)
    moment = torch.rand(20, 3, generator=torch.Generator().manual_seed(2)).to(DEVICE).T[..., None]
    results = []
    for setting, second in (("triton", moment.clone(memory_format=torch.preserve_format)), ("torch", moment.clone())):
        p = param.clone()
        assert setting == "torch" or not second.is_contiguous()
        with kernels.use(f"torch,muon_update_={setting}"):
            kernels.muon_update_(p, update, second, 0.02, 0.0, 0.9)
        results.append((p, second))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results))


@pytest.mark.parametrize("setting", BOTH)
@pytest.mark.parametrize("name", ["mlp_relu2", "linear_cross_entropy", "fp8_linear", "fp8_mlp_relu2"])
def test_autocast_changes_nothing_within_an_op(setting, name):
    op = kernels.OPS[name]
    results = []
    for enabled in (True, False):
        inputs = op.inputs(op.cases["odd"], torch.float32, DEVICE)
        for key in op.differentiable:
            inputs[key].requires_grad_()
        with kernels.use(f"torch,{name}={setting}"), torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=enabled):
            output = op.fn(**inputs)
        output.float().square().sum().backward()
        results.append([output.detach(), *(inputs[key].grad for key in op.differentiable)])
    for a, b in zip(*results):
        allowed = 0.0 if name != "mlp_relu2" or setting == "triton" else 0.02  # there autocast acts on PyTorch's own
        assert (a.float() - b).norm() <= allowed * b.norm()


@needs_triton
@pytest.mark.parametrize("name", [op.name for op in kernels.OPS.values() if op.triton and op.differentiable])
def test_no_kernel_gives_a_second_derivative(name):
    """None is promised; what autograd would make of the parts is wrong (of linear_relu2: NaN where relu is 0)."""
    op = kernels.OPS[name]
    inputs = op.inputs(next(iter(op.cases.values())), torch.float32, DEVICE)
    for key in op.differentiable:
        inputs[key].requires_grad_()
    with kernels.use(f"torch,{name}=triton"):
        outputs = [output for output in tensors(op.fn(**inputs)) if output.requires_grad]
    first = torch.autograd.grad(
        sum(output.square().sum() for output in outputs), [inputs[key] for key in op.differentiable], create_graph=True
    )
    for gradient in first:
        with pytest.raises(RuntimeError, match="differentiate twice|no autograd formula was registered"):
            gradient.sum().backward(retain_graph=True)


@pytest.mark.parametrize("setting", BOTH)
@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy"])
def test_a_batch_without_targets_has_no_gradient(setting, name):
    op = kernels.OPS[name]
    inputs = op.inputs(op.cases["odd"], torch.float32, DEVICE)
    inputs["targets"][:] = -1
    for key in op.differentiable:
        inputs[key].requires_grad_()
    with kernels.use(f"torch,{name}={setting}"):
        loss = op.fn(**inputs)
    loss.backward()
    assert loss.isnan()
    assert all((inputs[key].grad == 0).all() for key in op.differentiable)


@pytest.mark.parametrize("setting", BOTH)
def test_no_rows_and_no_columns(setting):
    with kernels.use(setting):
        for shape in ((0, 48), (2, 0, 48)):
            assert kernels.linear_relu2(randn(*shape), randn(64, 48)).shape == (*shape[:-1], 64)
            assert kernels.mlp_relu2(randn(*shape), randn(64, 48), randn(32, 64)).shape == (*shape[:-1], 32)
            assert kernels.fp8_linear(randn(*shape), randn(64, 48)).shape == (*shape[:-1], 64)
        assert kernels.polar_express(randn(2, 0, 5)).shape == (2, 0, 5)
    q, none = randn(1, 3, 2, 16).requires_grad_(), randn(1, 0, 1, 16)
    with kernels.use(f"torch,flash_attention={setting}"):
        y = kernels.flash_attention(q, none, none)
        flat = randn(1, 3, 2, 0)
        assert kernels.flash_attention(flat, flat, flat).shape == flat.shape
    y.sum().backward()
    assert (y == 0).all() and (q.grad == 0).all()


@pytest.mark.parametrize("setting", BOTH)
def test_rows_of_no_channels_and_matrices_without_rows(setting):
    none, scalar = randn(2, 3, 0), randn(1)
    with kernels.use(setting):
        mixing = (none, none, scalar, scalar)
        found = [kernels.rms_norm(none), *kernels.add_rms_norm(none, none), *kernels.mix_rms_norm(*mixing)]
        found += [kernels.fp8_add_rms_norm(none, none)[1].x, kernels.fp8_mix_rms_norm(*mixing)[1].x]
        assert all(tensor.numel() == 0 for tensor in found)
        for op in (kernels.linear_relu2, kernels.fp8_linear):
            assert (op(none, randn(5, 0)) == 0).all()
        table = randn(4, 0).requires_grad_()
        kernels.embedding(torch.zeros(2, 3, dtype=torch.int64, device=DEVICE), table).sum().backward()
        assert table.grad.shape == (4, 0)
        kernels.muon_momentum_(randn(2, 0, 5), randn(2, 0, 5), 0.9, torch.float32)
        for op in (kernels.mix_rms_norm, kernels.fp8_mix_rms_norm):
            a, b, x = (tensor.clone().requires_grad_() for tensor in (scalar, scalar, none))
            mixed, normed = op(x, none, a, b)
            (mixed.sum() + tensors(normed)[0].sum() if op is kernels.mix_rms_norm else mixed.sum()).backward()
            assert a.grad == b.grad == 0 and x.grad.shape == none.shape


@pytest.mark.parametrize("name", ["polar_express", "newton_schulz"])
def test_large_gradients_in_float16(name):
    g = randn(1, 300, 300, dtype=torch.float32) * 300  # its norm is beyond float16
    with kernels.use("torch"):
        found, exact = getattr(kernels, name)(g.half()), getattr(kernels, name)(g)
    assert ((found - exact).norm() / exact.norm()).item() < 0.05


def test_a_gradient_with_a_row_of_zeros_in_float16():
    g = randn(1, 33, 70, dtype=torch.float16)
    g[0, 4] = 0
    with kernels.use("torch"):
        assert kernels.muon_momentum_(g, torch.zeros_like(g), 0.9, torch.float16).isfinite().all()


def test_a_large_incoming_gradient_in_float16():
    x, w = randn(8, 16, dtype=torch.float16).requires_grad_(), randn(32, 16, seed=1, dtype=torch.float16)
    with kernels.use("torch"):
        loss = kernels.linear_cross_entropy(x, w, torch.arange(8, device=DEVICE))
    (loss * 65536).backward()  # as GradScaler begins; itself it is no float16
    assert x.grad.isfinite().float().mean() > 0.9


def test_sizes_may_change_under_compile():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda p, g: kernels.muon_momentum_(p, g, 0.9, torch.float32), backend="eager", fullgraph=True
    )
    for n in (8, 12, 20):
        assert len(tensors(compiled(randn(1, n, n + 2), randn(1, n, n + 2, seed=1)))) == 1


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: kernels.muon_momentum_(randn(3, 4), randn(3, 4), 0.9, torch.float32), "wanted a stack of matrices"),
        (
            lambda: kernels.muon_update_(randn(3, 4), randn(3, 4), randn(3, 1), 0.1, 0, 0.9),
            "wanted a stack of matrices",
        ),
        (lambda: kernels.flash_attention(randn(1, 3, 2, 4), randn(1, 3, 0, 4), randn(1, 3, 0, 4)), "a multiple of K"),
        (
            lambda: kernels.flash_attention_decode(
                randn(1, 1, 1, 4), randn(1, 3, 1, 4), randn(1, 3, 1, 4), torch.tensor([1.5], device=DEVICE)
            ),
            "start is torch.float32, wanted integers",
        ),
    ],
)
def test_wrong_use(call, message):
    with pytest.raises(ValueError, match=message):
        call()
