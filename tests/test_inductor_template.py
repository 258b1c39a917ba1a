"""relu² in the epilogue of Inductor's template: the pair's arithmetic, where it may be asked for, and the code that
Inductor writes for a card that is not here, interpreted.
"""

import importlib.util
import re
from dataclasses import asdict

import pytest
import torch

import kernels
from kernels import OPS
from kernels.dispatch import parse
from kernels.linear_relu2 import _mlp_relu2_triton, mlp_relu2_reference
from kernels.triton_utils import cdiv
from nanochat.recipe import model_config
from profiling.compiled import launches, lower, null_device
from profiling.compiled.case import Case

BLOCKS = (64, 32, 32, 8, 4, 2)  # of no meaning outside of torch.compile


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pair_is_the_references(dtype):
    """Output and gradients, with the product as an ordinary one."""
    inputs = OPS["mlp_relu2"].inputs(OPS["mlp_relu2"].cases["odd"], dtype, "cpu")
    given = [inputs[name].requires_grad_() for name in ("x", "w1", "w2")]
    found = []
    for y in _mlp_relu2_triton(*given, blocks=BLOCKS), mlp_relu2_reference(*given):
        found.append([y, *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), given)])
    for ours, wanted in zip(*found):
        torch.testing.assert_close(ours, wanted, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


def test_where_it_may_be_asked_for():
    assert parse("auto,mlp_relu2=inductor")["mlp_relu2"] == "inductor"
    for setting in "inductor", "auto,linear_relu2=inductor", "auto,mlp_relu2=fa3":
        with pytest.raises(ValueError, match="mlp_relu2 also takes inductor"):
            parse(setting)
    x, w1, w2 = (torch.zeros(shape) for shape in ((2, 4), (8, 4), (4, 8)))
    with kernels.use("auto,mlp_relu2=inductor"), pytest.raises(ValueError, match="on cpu, wanted bfloat16 or float32"):
        kernels.mlp_relu2(x, w1, w2)


@pytest.fixture(scope="module")
def lowered():
    """(the case, the launches of its step, the graphs' code) of one layer in float32 on an H100."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if reason := null_device.obstacle():
        pytest.skip(reason)
    config = asdict(model_config(1, 256, 48))
    case = Case(config, rows=3, dtype="float32", kernels="auto,mlp_relu2=inductor", optimizer=False)
    steps = lower.ask("tests.null_device.small_step", case, "h100")["launches"]
    return case, steps, "".join(graph["code"] for graph in lower.ask("profiling.compiled.lower", case, "h100"))


@pytest.mark.slow
def test_nothing_is_left_of_relu2_as_a_pass(lowered):
    """Both products are templates, of as many bytes and FLOPs as they have, and nothing else is."""
    case, steps, _ = lowered
    rows, C = case.rows * case.config["sequence_len"], case.config["n_embd"]
    made = {row["phase"]: row for row in steps if row["name"].startswith("triton_tem_")}
    assert len(made) == 4 and all(row["category"] == launches.PRODUCTS for row in made.values())
    assert all(row["flops"] == 8 * rows * C * C for row in made.values())
    once = 4 * (rows * C + 4 * C * C + rows * 4 * C)
    assert made["forward 2"]["bytes"] == once and made["backward 2"]["bytes"] == once + 4 * rows * 4 * C
    passes = [row["name"] for row in steps if row["category"] == launches.STREAMING]
    assert passes and not [name for name in passes if re.search(r"relu|(?<!r)sqrt", name)]


@pytest.mark.slow
def test_the_generated_kernels_compute_it(lowered, tmp_path, monkeypatch):
    """In Triton's interpreter, whatever Inductor would ask a card."""
    from torch._inductor.runtime import triton_heuristics

    case, _, code = lowered
    rows, C = case.rows * case.config["sequence_len"], case.config["n_embd"]
    monkeypatch.setattr(triton_heuristics, "template", lambda **options: lambda kernel: kernel)
    found = re.findall(r"async_compile\.triton\('(triton_tem_\w+)', '''(.*?)'''", code, re.DOTALL)
    assert len(found) == 2
    x, w1, w2, dout = (torch.randn(shape) for shape in ((rows, C), (4 * C, C), (C, 4 * C), (rows, C)))
    y = (x.double() @ w1.double().T).relu().square()
    dh = (dout.double() @ w2.double()) * 2 * y.sqrt()
    for name, text in found:
        (tmp_path / f"{name}.py").write_text(text)
        spec = importlib.util.spec_from_file_location(name, tmp_path / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        out = torch.empty(rows, 4 * C)
        backward = "sqrt" in name
        given = (dout, w2, y.float()) if backward else (x, w1)
        tile = {of: int(re.search(rf"BLOCK_{of} : tl.constexpr = (\d+)", text)[1]) for of in "MN"}
        getattr(module, name)[(cdiv(rows, tile["M"]) * cdiv(4 * C, tile["N"]),)](*given, out)
        torch.testing.assert_close(out.double(), dh if backward else y, rtol=1e-4, atol=1e-3)
