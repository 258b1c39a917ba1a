"""Linear layers of one input: sums of gradients, by the operators that add each product to them."""

import importlib
import warnings

import pytest
import torch

from kernels import use
from kernels.linear_relu2 import _mlp_relu2_triton, mlp_relu2
from kernels.linears import _add_input_gradient, _add_product, _linears, _widens, linears
from kernels.triton_utils import INTERPRETED

linear_relu2 = importlib.import_module("kernels.linear_relu2")  # the package has the function of that name


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shapes", [((8, 16),), ((8, 16), (24, 16), (5, 3))])
def test_results_and_gradients_are_those_of_plain_products(dtype, tolerance, shapes):
    """The last weight reads x's first three columns."""
    torch.manual_seed(0)
    x = torch.randn(3, 7, 16, dtype=dtype, requires_grad=True)
    weights = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    found = []
    for of in _linears, linears:  # the second is plain on a CPU
        ys = of(x, *weights)
        loss = sum((y * torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)).sum() for y in ys)
        found.append([*ys, *torch.autograd.grad(loss, [x, *weights])])
    for ours, wanted in zip(*found, strict=True):
        assert (ours - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize(
    "kept_by, plain, widths",
    [
        (lambda x, *weights, gradients: sum(y.sum(-1) for y in _linears(x, *weights, gradients=gradients)),
         lambda x, *weights: sum(y.sum(-1) for y in linears(x, *weights)), ((8, 16), (24, 16), (5, 16))),
        (_mlp_relu2_triton, mlp_relu2, ((48, 16), (16, 48))),
    ],
    ids=["linears", "MLP"],
)  # fmt: skip
def test_gradients_that_are_kept_are_added_to(kept_by, plain, widths, dtype, tolerance):
    """Of two micro-batches, in float32: as near to float64's as one product's rounding leaves the gradients of y."""
    if kept_by is _mlp_relu2_triton and not INTERPRETED:
        pytest.skip("wants Triton's interpreter")
    torch.manual_seed(0)
    weights = [torch.randn(width, dtype=dtype, requires_grad=True) for width in widths]
    kept = [torch.randn(width) for width in widths]
    exact = [weight.detach().double().requires_grad_() for weight in weights]
    wanted = [before.double() for before in kept]
    for _ in range(2):
        x = torch.randn(3, 7, 16, dtype=dtype, requires_grad=True)
        kept_by(x, *weights, gradients=kept).square().sum().backward()
        wide = x.detach().double().requires_grad_()
        *more, dx = torch.autograd.grad(plain(wide, *exact).square().sum(), [*exact, wide])
        wanted = [total + one for total, one in zip(wanted, more)]
        assert (x.grad - dx).norm() <= 10 * tolerance * dx.norm()
    assert all(weight.grad is None for weight in weights)
    for found, total in zip(kept, wanted):
        assert found.dtype == torch.float32 and (found - total).norm() <= 10 * tolerance * total.norm()


def test_gradients_may_be_kept_of_the_first_weights_alone():
    torch.manual_seed(0)
    x = torch.randn(7, 16, requires_grad=True)
    weights = [torch.randn(shape, requires_grad=True) for shape in ((8, 16), (24, 16), (5, 3))]
    kept = [torch.zeros(shape) for shape in ((8, 16), (24, 16))]
    wanted = torch.autograd.grad(sum(y.square().sum() for y in linears(x, *weights)), [*weights, x])
    sum(y.square().sum() for y in _linears(x, *weights, gradients=kept)).backward()
    assert [weight.grad is None for weight in weights] == [True, True, False]
    for found, exact in zip([*kept, weights[2].grad, x.grad], wanted, strict=True):
        assert (found - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("setting, ours", [("auto", [False, True]), ("triton", [True, True])])
def test_the_products_of_few_rows_are_left_to_cublas(monkeypatch, setting, ours):
    """Decoding with an MLP that won in training: a tile's rows would be idle, and a third of the card."""
    asked = []
    monkeypatch.setattr(linear_relu2, "triton_runs", lambda *_: True)
    monkeypatch.setattr(linear_relu2, "_mlp_relu2_triton", lambda *_: asked.append(True))
    monkeypatch.setattr(linear_relu2, "mlp_relu2_reference", lambda *_: asked.append(False))
    with use(setting):
        for rows in (3, 64):
            mlp_relu2(torch.ones(rows, 1, 16), torch.ones(48, 16), torch.ones(16, 48))
    assert asked == ours


def test_a_library_that_does_not_add_is_found_out(monkeypatch):
    def overwrites(total, a, b, out_dtype, out):
        return out.copy_(a.float() @ b.float())

    def turns(total, a, b, out_dtype, out):
        return out.add_((a.float() @ b.float()).flip(0))

    def mispairs(total, a, b, out_dtype, out):
        return out.add_(a.float() @ b.float().flip(0))

    def rounds(total, a, b, out_dtype, out):
        return out.add_((a.float() @ b.float()).bfloat16().float())

    def adds(total, a, b, out_dtype, out):
        return out.add_(a.float() @ b.float())

    for library, wanted in [*((each, False) for each in (overwrites, turns, mispairs, rounds)), (adds, True)]:
        monkeypatch.setattr(torch, "addmm", library)
        _widens.cache_clear()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert _widens(torch.device("cpu"), torch.bfloat16) is wanted
        assert len(said) == (not wanted) and all("sums were wrong" in str(one.message) for one in said)
    _widens.cache_clear()


def test_a_card_that_cannot_add_to_wider_totals_is_told_once(monkeypatch):
    def refused(*given, **named):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED\nmore of it")

    _widens.cache_clear()
    monkeypatch.setattr(torch, "addmm", refused)
    with pytest.warns(UserWarning, match="in a pass of their own: CUDA error: CUBLAS_STATUS_NOT_SUPPORTED$"):
        assert not _widens(torch.device("cpu"), torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _widens(torch.device("cpu"), torch.bfloat16)
    _widens.cache_clear()


def test_the_operators_are_some():
    for columns in (4, 2):
        torch.library.opcheck(_add_input_gradient, (torch.randn(3, 4), torch.randn(3, 5), torch.randn(5, columns)))
    torch.library.opcheck(_add_product, (torch.randn(5, 4), torch.randn(3, 5), torch.randn(3, 4)))


@pytest.mark.parametrize("shapes, kept", [(((8, 3), (8, 16)), 0), (((8, 16), (8, 3)), 2)])
def test_weights_of_fewer_columns_come_after_the_others(shapes, kept):
    weights = [torch.zeros(shape) for shape in shapes]
    with pytest.raises(ValueError, match=r"linears: weights are \[.*\], wanted \(F, 16\) for the first"):
        _linears(torch.zeros(7, 16), *weights, gradients=weights[:kept])
    assert linears(torch.zeros(7, 16), weights[kept // 2])[0].shape == (7, 8)  # alone, on a CPU, any
