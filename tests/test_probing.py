"""What a card is tried with: every op's probe passes on right kernels (interpreted here) and fails on broken ones."""

import sys

import pytest
import tiny
import torch

from kernels import OPS, probing, triton_utils, tuned

pytestmark = pytest.mark.skipif(not triton_utils.INSTALLED, reason="Triton is not installed, so no kernel can run")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NO_FLOAT16 = ("linear_relu2", "mlp_relu2", "fp8_linear", "fp8_mlp_relu2", "fp8_mix_rms_norm", "fp8_add_rms_norm")


def size(name, wanted=("d4", "odd_wide", "odd")):
    """Of a small model, or of matrices that the interpreter multiplies in a second."""
    op = OPS[name]
    small = name in ("polar_express", "newton_schulz", "muon_update_")
    case = next(key for key in (wanted[1:] if small else wanted) if key in op.cases)
    return 128 if name in ("flash_attention", "flash_attention_decode") else op.size(op.cases[case])


@pytest.mark.parametrize("name", tuned.ops())
def test_the_probe_passes(name):
    tiny.skip_refused(name, torch.bfloat16)
    probing.check(name, torch.bfloat16, size(name), DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", tuned.ops())
def test_the_probe_passes_in_every_dtype_and_at_the_sizes_of_a_model(name, dtype):
    if dtype == torch.float16 and name in NO_FLOAT16:
        pytest.skip(f"{name} refuses float16")
    tiny.skip_refused(name, dtype)
    for wanted in (("odd", "odd_wide", "odd"), ("d12", "odd_tall", "odd")):
        probing.check(name, dtype, size(name, wanted), DEVICE)


def test_every_op_with_kernels_has_a_probe_of_several_rows():
    for name in tuned.ops():
        op = OPS[name]
        assert op.triton is not None
        for case in op.probe(64):
            assert op.size(case) == 64, name  # the configuration in use is the one that is tried
            assert case.get("T", 2) > 1 and case.get("N", 2) > 1
    assert {name for name, op in OPS.items() if op.triton} == set(tuned.ops())


@pytest.mark.parametrize("name", ["muon_momentum_", "muon_update_"])
def test_muons_kernels_are_tried_in_the_dtypes_of_a_step(name, monkeypatch):
    """Weights and moments in float32, what goes through the products in bfloat16; and all in float32."""
    found = set()
    real = triton_utils.launch

    def launch(kernel, grid, *args, **constants):
        found.add(frozenset(arg.dtype for arg in args if torch.is_tensor(arg) and arg.is_floating_point()))
        real(kernel, grid, *args, **constants)

    monkeypatch.setattr(sys.modules["kernels.optim"], "launch", launch)
    probing.check(name, torch.float32, 64, DEVICE)
    assert {frozenset([torch.float32]), frozenset([torch.float32, torch.bfloat16])} <= found


def spoil(tensor, before):
    """The second half of what a kernel wrote becomes zero, or larger where it was zero."""
    flat, old = tensor.flatten(), before.flatten()
    half = len(flat) // 2 if len(flat) > 16 else 0  # a handful of maxima: all of them
    if tensor.dtype.itemsize == 1:
        flat, old = flat.view(torch.uint8), old.view(torch.uint8)
    same = (flat == old) | (flat.isnan() & old.isnan()) if flat.is_floating_point() else flat == old
    if not same.all():
        flat[half:] = 0
        tensor.copy_(flat.view(tensor.dtype).view(tensor.shape))


def launched(name, monkeypatch, broken=None):
    """The kernels that an op's probe launches; what the one that is `broken` writes is spoilt, each time."""
    found = []
    real = triton_utils.launch

    def launch(kernel, grid, *args, **constants):
        mine = [(arg, arg.clone()) for arg in args if torch.is_tensor(arg) and kernel is broken]
        real(kernel, grid, *args, **constants)
        for tensor, before in mine:
            spoil(tensor, before)
        found.append(kernel)

    with monkeypatch.context() as patch:
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").startswith("kernels") and getattr(module, "launch", None) is real:
                patch.setattr(module, "launch", launch)
        probing.check(name, torch.bfloat16, size(name, ("odd", "odd_wide", "odd")), DEVICE)
    return dict.fromkeys(found)


@pytest.mark.parametrize("name", tuned.ops())
def test_the_probe_fails_for_every_kernel_that_is_broken(name, monkeypatch):
    tiny.skip_refused(name, torch.bfloat16)
    for kernel in launched(name, monkeypatch):
        with pytest.raises(RuntimeError, match="is off by"):
            launched(name, monkeypatch, broken=kernel)
            pytest.fail(f"{kernel} was broken, and nobody noticed")
