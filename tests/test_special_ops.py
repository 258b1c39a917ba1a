"""What is special to single ops: edge cases, memory, epsilon, wrong use."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import linear_cross_entropy as lce_function
from kernels.linear_cross_entropy import chunk_rows

lce_module = __import__("sys").modules["kernels.linear_cross_entropy"]


class Watch(TorchDispatchMode):
    """Records the operators called and the shapes they give."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if torch.is_tensor(tensor) or tensor is None:  # None: an operator that only changes its arguments
                shape = () if tensor is None else tuple(tensor.shape)
                self.calls.append((func.overloadpacket.__name__, shape))
        return result

    def count(self, name):
        return sum(call == name for call, _ in self.calls)


# ---- linear_cross_entropy


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(lce_module, "CHUNK_LOGITS", 64 * 100)  # 64 rows of 100
    assert chunk_rows(100, False, torch.empty(0)) == 64


def problem(N=150, V=100, C=16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, C, generator=generator).to(dtype).requires_grad_()
    w = torch.randn(V, C, generator=generator).requires_grad_()
    t = torch.randint(V, (N,), generator=generator)
    t[::7] = -1
    return x, w, t


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_uneven_chunks_give_what_the_whole_gives(small_chunks, reduction):
    x, w, t = problem()
    w = w.detach().double().requires_grad_()
    chunked = lce_function(x, w, t, 15.0, reduction=reduction)
    whole = kernels.cross_entropy(x @ w.T, t, 15.0, reduction=reduction)
    torch.testing.assert_close(chunked, whole)
    weights = torch.randn(chunked.shape, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((chunked * weights).sum(), (x, w)), torch.autograd.grad((whole * weights).sum(), (x, w))
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_kept_gradient_of_the_weight_is_added_to_and_autograd_gets_none(small_chunks, reduction, fp8):
    x, w, t = problem(dtype=torch.float32)
    loss = lambda **more: lce_function(x, w, t, 15.0, reduction=reduction, fp8=fp8, **more).square().sum()
    dw, dx = torch.autograd.grad(loss(), (w, x))
    kept = torch.randn(w.shape, generator=torch.Generator().manual_seed(1))
    wanted = kept.double() + 2 * dw.double()
    for _ in range(2):
        loss(gradient=kept).backward()
    assert w.grad is None and torch.equal(x.grad, 2 * dx)
    assert ((kept - wanted).norm() / wanted.norm()).item() < 2e-7


def test_the_gradient_of_a_weight_in_16_bits_is_kept_in_float32(small_chunks):
    """As of a weight that is cast once a step: no sum is rounded to 16 bits."""
    x, w, t = problem(dtype=torch.bfloat16)
    (dw,) = torch.autograd.grad(lce_function(x, w, t, 15.0), w)
    kept = torch.zeros(w.shape)
    lce_function(x, w.detach().bfloat16().requires_grad_(), t, 15.0, gradient=kept).backward()
    assert torch.equal(kept, dw) and not torch.equal(kept, kept.bfloat16().float())


@pytest.mark.parametrize("kept, wrong", [((100, 16), torch.bfloat16), ((99, 16), torch.float32)])
def test_a_gradient_that_does_not_fit_is_refused(kept, wrong):
    x, w, t = problem(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"gradient is \(.*, 16\) torch.* wanted as weight, \(100, 16\), in .*float32"):
        lce_function(x, w, t, 15.0, gradient=torch.zeros(kept, dtype=wrong))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_more_than_a_chunk_of_logits_is_alive(small_chunks, reduction):
    x, w, t = problem()
    with Watch() as watch:
        lce_function(x, w, t, 15.0, reduction=reduction).sum().backward()
    rows = [shape[0] for _, shape in watch.calls if len(shape) == 2 and shape[1] == 100]
    assert max(rows) <= 64
    with Watch() as watch:  # the watch would see whole logits
        kernels.cross_entropy(x @ w.double().T, t)
    assert (150, 100) in {shape for _, shape in watch.calls}


def test_without_gradients_there_is_no_gradient_work():
    x, w, t = problem()
    with torch.no_grad(), Watch() as watch:
        lce_function(x, w, t, 15.0)
    assert (watch.count("mm"), watch.count("add_product")) == (1, 0)
    with Watch() as watch:
        lce_function(x, w, t, 15.0).backward()
    assert (watch.count("mm"), watch.count("add_product")) == (2, 1)  # dW's product is added by an operator of ours


def test_a_float32_weight_gets_a_float32_gradient_from_bfloat16_activations():
    x, w, t = problem(dtype=torch.bfloat16)
    lce_function(x, w, t, 15.0).backward()
    assert w.grad.dtype == torch.float32 and x.grad.dtype == torch.bfloat16
    exact = w.detach().double().requires_grad_()
    lce_function(x.detach().double(), exact, t, 15.0).backward()
    assert (w.grad - exact.grad).norm() / exact.grad.norm() < 1e-2


def test_all_ignored_none_at_all_and_backward_twice():
    x, w, t = problem()
    ignored = torch.full_like(t, -1)
    assert lce_function(x, w, ignored).isnan() and lce_function(x, w, ignored, reduction="sum") == 0
    assert (lce_function(x, w, ignored, reduction="none") == 0).all()
    lce_function(x, w, ignored, reduction="sum").backward()
    assert x.grad.abs().max() == 0 == w.grad.abs().max()
    empty = lce_function(x[:0], w, t[:0], reduction="sum")
    assert empty == 0 and lce_function(x[:0], w, t[:0], reduction="none").shape == (0,)
    loss = lce_function(x, w, t)
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    second = torch.autograd.grad(loss, (x, w))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_ignored_rows_get_no_gradient():
    x, w, t = problem()
    lce_function(x, w, t, 15.0).backward()
    assert (x.grad[t == -1] == 0).all() and (x.grad[t != -1].abs().sum(1) > 0).all()


# ---- the epsilon


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_epsilon_is_float32s_whatever_the_dtype(dtype):
    x = (torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 2e-4).to(dtype)
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 2**-23).sqrt()
    found = kernels.rms_norm(x).double()
    assert (found - exact).norm() / exact.norm() < 5e-3
    own = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + torch.finfo(torch.bfloat16).eps).sqrt()
    assert (own - exact).norm() / exact.norm() > 0.5  # bfloat16's own epsilon would show


# ---- attention


def qkv(T=40, S=None):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, T, 4, 16, generator=generator)
    return q, *(torch.randn(2, S or T, 2, 16, generator=generator) for _ in range(2))


def test_a_window_as_long_as_the_text_is_none():
    q, k, v = qkv()
    full = kernels.flash_attention(q, k, v)
    for window in (39, 40, 1000):
        assert torch.equal(kernels.flash_attention(q, k, v, window=window), full)
    assert not torch.allclose(kernels.flash_attention(q, k, v, window=38), full)


def test_decoding_is_attention_row_by_row_and_blind_to_what_lies_beyond():
    q, k, v = qkv()
    whole = kernels.flash_attention(q, k, v, window=7)
    start = torch.tensor([39, 20])
    now = torch.stack([q[0, 39:40], q[1, 20:21]])
    found = kernels.flash_attention_decode(now, k, v, start, window=7)
    torch.testing.assert_close(found[0, 0], whole[0, 39])
    torch.testing.assert_close(found[1, 0], whole[1, 20])
    k2, v2 = k.clone(), v.clone()
    k2[1, 21:], v2[1, 21:] = 1e4, 1e4
    assert torch.equal(kernels.flash_attention_decode(now, k2, v2, start, window=7), found)


# ---- wrong use


def zeros(*shape):
    return torch.zeros(shape)


@pytest.mark.parametrize(
    "call, complaint",
    [
        (lambda: kernels.rms_norm(zeros(2, 4), zeros(5)), r"rms_norm: weight is \(5,\)"),
        (lambda: kernels.mix_rms_norm(zeros(2, 4), zeros(2, 5), zeros(1), zeros(1)), "mix_rms_norm: x0 is"),
        (lambda: kernels.mix_rms_norm(zeros(2, 4), zeros(2, 4), zeros(2), zeros(1), None, 1), "mix_rms_norm: b has 1"),
        (
            lambda: kernels.mix_rms_norm(zeros(2, 4), zeros(2, 4), zeros(1), zeros(1), zeros(4)),
            "mix_rms_norm: delta is",
        ),
        (lambda: kernels.add_rms_norm(zeros(2, 4), zeros(2, 4).half()), "add_rms_norm: delta is .*float16"),
        (lambda: kernels.rotary(zeros(1, 2, 3, 5), zeros(2, 2), zeros(2, 2)), "rotary: x is .* D even"),
        (lambda: kernels.rotary(zeros(1, 2, 3, 4), zeros(3, 2), zeros(3, 2)), r"rotary: cos is \(3, 2\)"),
        (lambda: kernels.qk_norm_rotary(zeros(1, 2, 3, 4), zeros(1, 3, 1, 4), zeros(2, 2), zeros(2, 2)), "for k"),
        (lambda: kernels.cross_entropy(zeros(3, 4), torch.zeros(2).long()), "cross_entropy: targets are"),
        (lambda: kernels.cross_entropy(zeros(3, 4), torch.zeros(3).long(), reduction="avg"), "reduction is 'avg'"),
        (lambda: lce_function(zeros(3, 4), zeros(5, 6), torch.zeros(3).long()), "weight is"),
        (lambda: lce_function(zeros(3, 4), zeros(5, 4), torch.zeros(4).long()), "targets are"),
        (lambda: kernels.polar_express(zeros(4)), "polar_express: g is"),
        (lambda: kernels.polar_express(zeros(4, 4), steps=6), "steps is 6"),
        (lambda: kernels.newton_schulz(torch.zeros(4, 4).int()), "newton_schulz: g is .*int32"),
        (lambda: kernels.newton_schulz(zeros(4, 4), steps=0), "steps is 0"),
        (lambda: kernels.flash_attention(*[zeros(1, 4, 3, 8)] * 2, zeros(1, 4, 2, 8)), "flash_attention: q is"),
        (lambda: kernels.flash_attention(zeros(1, 4, 3, 8), *[zeros(1, 4, 2, 8)] * 2), "multiple of K"),
        (lambda: kernels.mlp_relu2(zeros(2, 3), zeros(4, 3), zeros(3, 5)), "mlp_relu2: w1 is .* w2"),
        (lambda: kernels.flash_attention(*[zeros(1, 4, 2, 8)] * 3, window=-1), "window is -1"),
        (lambda: kernels.flash_attention_decode(*[zeros(1, 4, 2, 8)] * 3, torch.zeros(2).long()), "start is"),
        (lambda: kernels.linear_relu2(zeros(2, 3), zeros(4, 5)), "linear_relu2: weight is"),
        (lambda: kernels.fp8_linear(zeros(2, 3), zeros(4, 5)), "fp8_linear: weight is"),
        (lambda: kernels.adamw_(zeros(2), zeros(3), zeros(2), zeros(2), 1, 0.1, 0.9, 0.9, 1e-8, 0.0), "grad is"),
        (lambda: kernels.muon_momentum_(zeros(1, 2, 3), zeros(1, 3, 2), 0.9, torch.float32), "momentum_buffer is"),
        (lambda: kernels.muon_update_(zeros(1, 2, 3), zeros(1, 2, 3), zeros(1, 2, 1), 0.1, 0.0, 0.9), "second_moment"),
    ],
)
def test_wrong_use_names_op_argument_found_and_wanted(call, complaint):
    with pytest.raises(ValueError, match=complaint):
        call()
