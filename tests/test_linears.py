"""Several linear layers of one input: the sum of its gradients, by the operator that adds each product to it."""

import pytest
import torch

from kernels.linears import _add_input_gradient, _linears, linears


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("widths", [(8,), (8, 24, 5)])
def test_results_and_gradients_are_those_of_plain_products(dtype, tolerance, widths):
    torch.manual_seed(0)
    x = torch.randn(3, 7, 16, dtype=dtype, requires_grad=True)
    weights = [torch.randn(width, 16, dtype=dtype, requires_grad=True) for width in widths]
    found = []
    for of in _linears, linears:  # the second is plain on a CPU
        ys = of(x, *weights)
        loss = sum((y * torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)).sum() for y in ys)
        found.append([*ys, *torch.autograd.grad(loss, [x, *weights])])
    for ours, wanted in zip(*found, strict=True):
        assert (ours - wanted).norm() <= tolerance * wanted.norm()


def test_the_operator_is_one():
    torch.library.opcheck(_add_input_gradient, (torch.randn(3, 4), torch.randn(3, 5), torch.randn(5, 4)))
