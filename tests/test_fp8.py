"""fp8: exact rounding, errors next to torch's own fp8 products, delayed scales, and a model trained with it."""

import importlib
import math

import pytest
import tiny
import torch

import kernels
from kernels import triton_utils
from kernels.fp8 import quantize as q
from kernels.fp8.quantize import E4M3, E5M2, Quantized, new_history
from nanochat.step import calibrate

lce = importlib.import_module("kernels.linear_cross_entropy")  # the package has the function of that name
FP8_OPS = ("fp8_linear", "fp8_mlp_relu2", "fp8_mix_rms_norm", "fp8_add_rms_norm", "linear_cross_entropy")
EVERYTHING = ",".join(["torch", *(f"{name}=triton" for name in FP8_OPS)])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OBSTACLE = tiny.refused("fp8_linear") if triton_utils.INSTALLED else "Triton is not installed, so no kernel can run"
needs_triton = pytest.mark.skipif(OBSTACLE != "", reason=OBSTACLE)


def randn(*shape, seed=0, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE)


def error(found, exact):
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


# ---- rounding


@needs_triton
@pytest.mark.parametrize("kind", [q.PLAIN, q.RELU2, q.RELU2_BACKWARD])
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("shape", [(67, 100), (1, 16), (128, 64), (200, 33)])
def test_the_kernel_rounds_as_torch_does(kind, dtype, shape):
    x = randn(*shape, scale=3.0) * torch.logspace(-6, 0, shape[1]).to(DEVICE)  # down to numbers that underflow
    h = randn(*shape, seed=1) if kind == q.RELU2_BACKWARD else None
    mine, theirs = (q.quantize(x, dtype, fused, kind, h) for fused in (True, False))
    assert torch.equal(mine.inverse, theirs.inverse)
    assert torch.equal(mine.values.float(), theirs.values.float())
    assert torch.equal(mine.transposed.float(), mine.values.float().t())
    assert mine.values.float().abs().max() == q.LARGEST[dtype]


def test_rounding_by_hand():
    x = torch.tensor([[448.0, 17.0, 19.0, -25.0, 2.0**-9, 2.0**-10, 0.0]])  # 16, 18, 20 … lie between 16 and 32
    made = q.quantize(x, E4M3, False)
    assert made.inverse == 1 and made.values.float().tolist() == [[448.0, 16.0, 20.0, -24.0, 2.0**-9, 0.0, 0.0]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("delayed", [False, True])
def test_what_is_not_finite_stays_so(bad, delayed):
    """Also where the scale does not know of it; and the history does not take it in."""
    x, w = randn(8, 16), randn(16, 16, seed=1)
    x[3, 5] = bad
    history = new_history(3, DEVICE) if delayed else None
    with kernels.use("torch"):
        y = kernels.fp8_linear(x, w, history)
    assert y[3].isnan().all()
    assert history is None or history.isfinite().all()


# ---- products


def through_torch(a, b, dtype_a=E4M3, dtype_b=E4M3):
    """a·bᵀ as nanochat's fp8 does it: one scale each from the maximum, torch._scaled_mm."""
    scaled = []
    for x, dtype in ((a, dtype_a), (b, dtype_b)):
        scale = torch.finfo(dtype).max / x.abs().max().clamp_min(1e-12)
        scaled.append(((x * scale).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype), 1 / scale))
    (qa, sa), (qb, sb) = scaled
    return torch._scaled_mm(qa, qb.t(), scale_a=sa, scale_b=sb, out_dtype=torch.bfloat16)


@pytest.mark.parametrize("setting", ["torch", pytest.param("triton", marks=needs_triton)])
def test_no_worse_than_torchs_own(setting):
    """Forward and both gradients against float64, next to torch._scaled_mm in the same formats."""
    x, w, dy = randn(256, 128), randn(192, 128, seed=1, scale=0.1), randn(256, 192, seed=2, scale=1e-5)
    x.requires_grad_(), w.requires_grad_()
    with kernels.use(f"torch,fp8_linear={setting}"):
        y = kernels.fp8_linear(x, w)
        dx, dw = torch.autograd.grad(y, (x, w), dy)
    x, w, gy = x.detach(), w.detach(), dy.double()
    for mine, theirs, exact in (
        (y, through_torch(x, w), x.double() @ w.double().T),
        (dx, through_torch(dy, w.T.contiguous(), E5M2), gy @ w.double()),
        (dw, through_torch(dy.T.contiguous(), x.T.contiguous(), E5M2), gy.T @ x.double()),
    ):
        assert error(mine, exact) <= 1.02 * error(theirs, exact)
        assert error(mine, exact) < 0.08


def test_the_norms_own_scale_costs_no_precision():
    """√C instead of the maximum: a scale moves only where numbers underflow."""
    x, delta, w = randn(512, 256), randn(512, 256, seed=1), randn(64, 256, seed=2)
    with kernels.use("torch"):
        _, normed = kernels.fp8_add_rms_norm(x, delta)
        exact = normed.x.double() @ w.double().T
        from_norm, from_maximum = kernels.fp8_linear(normed, w), kernels.fp8_linear(normed.x, w)
    assert normed.fp8.inverse.item() == pytest.approx(16 / 448)
    assert error(from_norm, exact) <= 1.02 * error(from_maximum, exact)


@needs_triton
def test_norm_copies_feed_the_products():
    x, delta, w = randn(48, 64), randn(48, 64, seed=1), randn(32, 64, seed=2)
    results = []
    for setting in ("torch", EVERYTHING):
        a, b, c = (value.clone().requires_grad_() for value in (x, delta, w))
        with kernels.use(setting):
            summed, normed = kernels.fp8_add_rms_norm(a.view(2, 24, 64), b.view(2, 24, 64))
            assert (
                isinstance(normed, Quantized) and normed.x.shape == (2, 24, 64) and normed.fp8.values.shape == (48, 64)
            )
            y = kernels.fp8_linear(normed, c)
            (y.square().sum() + summed.sum()).backward()
        results.append((y, a.grad, b.grad, c.grad))
    for mine, theirs in zip(*results):
        assert error(mine, theirs) < 3e-3


@pytest.mark.parametrize("setting", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_head_in_fp8(setting, reduction):
    x, w = randn(96, 64), randn(160, 64, seed=1, scale=0.5)
    targets = torch.randint(160, (96,), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    targets[::7] = -1
    found = []
    for fp8, implementation, dtype in ((True, setting, torch.float32), (False, "torch", torch.float64)):
        a, b = x.to(dtype, copy=True).requires_grad_(), w.to(dtype, copy=True).requires_grad_()
        with kernels.use(f"torch,linear_cross_entropy={implementation}"):
            loss = kernels.linear_cross_entropy(a, b, targets, 15.0, reduction=reduction, fp8=fp8)
        weights = torch.linspace(0.1, 2, 96, dtype=loss.dtype, device=DEVICE) if reduction == "none" else 1.0
        (loss * weights).sum().backward()
        found.append((loss.detach(), a.grad, b.grad))
    for mine, exact, allowed in zip(*found, (0.02, 0.12, 0.12)):
        assert error(mine, exact) < allowed


@needs_triton
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("mode, refused, ours", [("auto", True, False), ("auto", False, True), ("triton", True, True)])
def test_the_heads_copies_are_rounded_by_whom_fp8_linear_is(monkeypatch, reduction, mode, refused, ours):
    """A card without fp8 has a kernel for the loss and none that rounds; a probe may refuse the second alone."""
    rounded, quantize = [], lce.quantize
    monkeypatch.setattr(
        lce, "quantize", lambda x, dtype, fused, **more: rounded.append(fused) or quantize(x, dtype, fused, **more)
    )
    monkeypatch.setattr(lce, "triton_runs", lambda op, x, size: op != "fp8_linear" or not refused)
    x, w = randn(96, 64).requires_grad_(), randn(160, 64, seed=1).requires_grad_()
    with kernels.use(f"auto,linear_cross_entropy={mode}"):
        kernels.linear_cross_entropy(
            x, w, torch.arange(96, device=DEVICE), reduction=reduction, fp8=True
        ).sum().backward()
    assert len(rounded) >= 3 and set(rounded) == {ours}


@pytest.mark.parametrize("tokens", [100, 104, 256])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cublas_gets_rows_that_begin_at_multiples_of_16_bytes(monkeypatch, tokens, reduction):
    """Else it refuses, in a training whose --max-seq-len is odd."""
    plain = torch._scaled_mm

    def watched(a, b, **how):
        asked.append(a.size(1))
        for rows in (a, b.t()):
            assert rows.stride(1) == 1 and rows.stride(0) % 16 == 0 and rows.storage_offset() % 16 == 0
        return plain(a, b, **how)

    asked = []
    monkeypatch.setattr(torch, "_scaled_mm", watched)
    monkeypatch.setattr(q, "_has_units", lambda a: True)
    monkeypatch.setattr(lce, "chunk_rows", lambda *_: 64)
    x, w = randn(tokens, 32).requires_grad_(), randn(160, 32, seed=1, scale=0.5).requires_grad_()
    targets = torch.arange(tokens, device=DEVICE) % 160
    with kernels.use("torch"):
        kernels.linear_cross_entropy(x, w, targets, reduction=reduction, fp8=True).sum().backward()
    assert asked.count(64) == tokens // 64  # the weight's gradient, of whole chunks


def test_amds_cards_have_no_units_for_these_formats(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 4))
    assert not q.has_units(0)
    monkeypatch.setattr(torch.version, "hip", None)
    assert q.has_units(0)


# ---- delayed scales


def test_delayed_scales_are_the_largest_of_the_last_calls():
    history = new_history(3, DEVICE)
    w = randn(16, 16, seed=1)
    with kernels.use("torch"):
        for i, largest in enumerate([4.0, 1.0, *[0.5] * 20]):
            x = randn(8, 16)
            x *= largest / x.abs().max()
            y = kernels.fp8_linear(x, w, history)
            assert history[0, 0].item() == pytest.approx(largest)
            wanted = max([1.0] * (q.HISTORY - 1 - i) + [4.0, 1.0, *[0.5] * 20][max(0, i + 1 - q.HISTORY) : i + 1])
            assert history[0].max().item() == pytest.approx(wanted)
    assert history[0].max().item() == pytest.approx(0.5)  # the guess and the 4 are forgotten
    assert error(y, kernels.fp8_linear(x, w)) < 0.02  # now the scale is that of the tensor itself


def test_what_exceeds_the_delayed_scale_saturates():
    history = new_history(3, DEVICE)
    with kernels.use("torch"):
        y = kernels.fp8_linear(torch.full((16, 16), 8.0, device=DEVICE), torch.eye(16, device=DEVICE), history)
    assert torch.allclose(y, torch.ones_like(y)) and history[0, 0] == 8


@needs_triton
def test_delayed_scales_by_kernel_and_reference():
    found = []
    for setting in ("torch", EVERYTHING):
        linear, mlp = new_history(3, DEVICE), new_history(6, DEVICE)
        with kernels.use(setting):
            for step in range(3):
                x = randn(32, 64, seed=step).requires_grad_()
                y = kernels.fp8_linear(x, randn(64, 64, seed=7, scale=0.1), linear)
                z = kernels.fp8_mlp_relu2(
                    y, randn(128, 64, seed=8, scale=0.1), randn(64, 128, seed=9, scale=0.1).requires_grad_(), mlp
                )
                z.square().mean().backward()
        found.append((linear, mlp, z.detach(), x.grad))
    for mine, theirs in zip(*found):
        assert error(mine, theirs) < 3e-3


# ---- a model


def losses(scaling, setting="torch", compile=None, steps=8):
    model = tiny.model(n_embd=64, n_head=4, n_kv_head=2).to(DEVICE).train()
    if scaling:
        model.set_fp8(scaling)
    optimizer = model.setup_optimizer()
    ids = torch.randint(300, (4, 33), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    found = []
    torch._dynamo.reset()
    with kernels.use(setting):
        calibrate(model, optimizer, inputs, targets, 1 / targets.numel(), world=1)
        run = torch.compile(model, fullgraph=True, backend=compile) if compile else model
        for _ in range(steps):
            loss = run(inputs, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
    return found, model


@pytest.mark.parametrize("scaling", ["current", "delayed"])
def test_a_model_learns_as_in_float32(scaling):
    exact, _ = losses(None)
    found, model = losses(scaling)
    assert found != exact
    assert max(abs(a - b) / b for a, b in zip(found, exact)) < 0.02
    assert exact[-1] < 0.2 * exact[0]
    ids = torch.arange(32, device=DEVICE)[None]
    evaluated = model.eval()(ids, ids)
    model.train()
    model.fp8 = False
    for module in model.modules():
        if hasattr(module, "fp8"):
            module.fp8 = False
    assert torch.equal(evaluated, model(ids, ids))  # in eval mode nothing is rounded


@needs_triton
@pytest.mark.parametrize("scaling", ["current", pytest.param("delayed", marks=pytest.mark.slow)])
def test_a_model_on_the_kernels(scaling):
    mine, theirs = losses(scaling, EVERYTHING, steps=3)[0], losses(scaling, steps=3)[0]
    assert max(abs(a - b) for a, b in zip(mine, theirs)) < 2e-3


@pytest.mark.parametrize("scaling", ["delayed", pytest.param("current", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "setting", ["torch", pytest.param(EVERYTHING, marks=[needs_triton, pytest.mark.slow], id="triton")]
)
def test_a_model_is_traced_whole_and_its_histories_move(scaling, setting):
    traced, model = losses(scaling, setting, "aot_eager", steps=3)
    eager, plain = losses(scaling, setting, steps=3)
    assert traced == pytest.approx(eager, abs=1e-5)
    histories = plain.histories()
    assert bool(histories) == (scaling == "delayed")
    for name, history in model.histories().items():
        assert torch.allclose(history, histories[name], rtol=1e-3)
        gradient = history[-1]
        assert (gradient[0] != gradient[1]) and gradient[0] > 0, name


# ---- wrong use


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: kernels.fp8_linear(randn(2, 3), randn(4, 5)), r"fp8_linear: weight is \(4, 5\)"),
        (
            lambda: kernels.fp8_linear(randn(2, 3).half(), randn(4, 3)),
            "fp8_linear: x is torch.float16, wanted bfloat16",
        ),
        (lambda: kernels.fp8_linear(randn(2, 3), randn(4, 3), torch.ones(2, 16)), r"history is \(2, 16\)"),
        (lambda: kernels.fp8_mlp_relu2(randn(2, 3), randn(4, 3), randn(3, 5)), r"fp8_mlp_relu2: w1 is \(4, 3\)"),
        (lambda: kernels.fp8_add_rms_norm(randn(2, 3), randn(2, 4)), r"fp8_add_rms_norm: delta is \(2, 4\)"),
        (
            lambda: kernels.linear_cross_entropy(
                randn(2, 3).half(), randn(4, 3), torch.zeros(2, dtype=torch.int64, device=DEVICE), fp8=True
            ),
            "wanted float32 or bfloat16 for fp8",
        ),
        (lambda: tiny.model().set_fp8("late"), "fp8 scaling is 'late', wanted current or delayed"),
        (lambda: tiny.model(n_embd=24, n_head=2, n_kv_head=2).set_fp8("current"), "a width of 24 is no multiple of 16"),
    ],
)
def test_wrong_use(call, message):
    with pytest.raises(ValueError, match=message):
        call()
