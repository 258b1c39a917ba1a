"""What operators of ours cost, by the shapes in a trace: against the registry, for events that PyTorch recorded."""

import json

import pytest
import test_trace
import tiny
import torch
from hypothesis import given, settings
from test_trace import event, kernel, step
from torch.profiler import ProfilerActivity, profile

import kernels
from kernels import OPS, triton_utils
from kernels.registry import tensors
from profiling.recorded import costs, custom_ops

pytestmark = pytest.mark.skipif(not triton_utils.INSTALLED, reason="Triton is not installed, so no kernel can run")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The operator that does an op's forward, and those of one launch in its backward with its bytes over the forward's.
FORWARD = {
    "rms_norm": ("rms_norm", {"rms_norm_backward": (3 + 2) / 2}),  # of few rows, each its part of the weight's gradient
    "mix_rms_norm": ("mix_rms_norm", {"mix_rms_norm_backward": 7 / 5}),
    "add_rms_norm": ("add_rms_norm", {"add_rms_norm_backward": 4 / 4}),
    "rotary": ("rotary", {"rotary_backward": 1}),
    "qk_norm_rotary": ("qk_norm_rotary", {"qk_norm_rotary_backward": 3 / 2}),
    "cross_entropy": ("cross_entropy", {"cross_entropy_backward": 2}),
    "flash_attention": ("flash_attention", {}),
    "adamw_": ("adamw", {}),
}


def recorded(tmp_path, name, case="odd"):
    """The events of our operators in a trace of an op, forward and backward, in bfloat16."""
    tiny.skip_refused(name, torch.bfloat16)
    op = OPS[name]
    inputs = op.inputs(op.cases[next(key for key in op.cases if key.startswith(case))], torch.bfloat16, DEVICE)
    for key in op.differentiable:
        inputs[key].requires_grad_()
    with kernels.use(f"torch,{name}=triton"), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as made:
        results = [result for result in tensors(op.fn(**inputs)) if result.requires_grad]
        if results:
            sum((result.float() ** 2).sum() for result in results).backward()
    made.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    return [e for e in events if custom_ops.short_name(e.get("name", ""))]


@pytest.mark.parametrize("name", FORWARD)
def test_bytes_and_flops_are_those_of_the_registry(tmp_path, name):
    op = OPS[name]
    case = op.cases[next(key for key in op.cases if key.startswith("odd"))]
    forward, backward = FORWARD[name]
    found = {custom_ops.short_name(e["name"]): custom_ops.cost(e["name"], e["args"]) for e in recorded(tmp_path, name)}
    least = op.bytes(case, torch.bfloat16)
    assert found[forward].bytes == pytest.approx(least, rel=0.1)  # angles, log-sums and weights are not counted there
    assert found[forward].flops == (op.flops(case) if name == "flash_attention" else 0)
    for part, ratio in backward.items():
        assert found[part].bytes == pytest.approx(ratio * least, rel=0.1)


@pytest.mark.parametrize("name", ["linear_relu2", "mlp_relu2"])
def test_products_of_ours_are_products(tmp_path, name):
    case = OPS[name].cases["odd"]
    flops = 2 * case["N"] * case["C"] * case["F"]
    found = recorded(tmp_path, name)
    assert {custom_ops.short_name(e["name"]) for e in found} >= {"linear_relu2"}
    for e in found:
        assert costs.product(e["name"], e["args"]).flops == flops and custom_ops.cost(e["name"], e["args"]) is None


@pytest.mark.parametrize("name", ["embedding", "polar_express", "muon_update_", "flash_attention_decode"])
def test_what_depends_on_data_or_takes_several_kernels_is_not_known(tmp_path, name):
    found = recorded(tmp_path, name)
    assert found and all(custom_ops.cost(e["name"], e["args"]) is None for e in found)


def test_in_a_trace_they_have_rates_and_are_predicted(tmp_path):
    """The operator's event encloses autograd's copy of it, which launches the kernel."""
    norm, copy = (e for e in recorded(tmp_path, "rms_norm") if custom_ops.short_name(e["name"]) == "rms_norm")
    seen = test_trace.analysed(
        step(0, 100),
        event(norm["name"], "cpu_op", 1, 9, **dict(norm["args"], **{"External id": 3})),
        event(copy["name"], "cpu_op", 2, 8, **dict(copy["args"], **{"External id": 4})),
        kernel("_rms_norm_fwd_kernel", 10, 30, **{"External id": 4}),
    )
    (row,) = seen.ops
    moved = custom_ops.cost(norm["name"], norm["args"]).bytes
    assert (row["bytes"], row["bytes_ns"], row["flops"]) == (moved, 20_000, 0)
    assert row["shapes"] == [dict(flops=0, bytes=moved, count=1, ns=20_000)]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(test_trace.shapes, test_trace.dtypes, test_trace.junk)
def test_shapes_that_cannot_be_are_not_known(dims, types, concrete):
    for op in ("rms_norm", "flash_attention", "adamw", "no_such_op"):
        args = {"Input Dims": dims, "Input type": types, "Concrete Inputs": concrete}
        found = custom_ops.cost(f"kernels::{op}", args)
        assert found is None or found.bytes >= 0
