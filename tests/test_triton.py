"""Every Triton kernel against float64, next to PyTorch in the same dtype: on a GPU where there is one, else
interpreted.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from kernels import OPS, targets, triton_utils, tuned
from kernels.registry import tensors
from nanochat.gpt import GPT

pytestmark = pytest.mark.skipif(not triton_utils.INSTALLED, reason="Triton is not installed, so no kernel can run")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = tuned.ops()
LARGEST = 1 << 19  # bytes of a case that is interpreted
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The interpreter truncates where a card rounds when it stores bfloat16: one unit in the last place is allowed.
FLOOR = {torch.float32: 5e-7, torch.bfloat16: 4e-3 if triton_utils.INTERPRETED else 5e-4, torch.float16: 2e-4}
FLIPS = 3e-3  # fp8: a number in thousands lies so near the middle that it is rounded to the other side
NOT_IN_FLOAT16 = {
    "linear_relu2": "in which relu² underflows", "mlp_relu2": "in which relu² underflows",
    "fp8_linear": "wanted bfloat16", "fp8_mlp_relu2": "wanted bfloat16",
}  # fmt: skip
FORWARD_ERROR = {
    "polar_express": 3,
    "newton_schulz": 3,
}  # the iteration amplifies rounding: other constants, same growth
# Kernels that add nothing up. A sum's order depends on which thread has which element, and that on what the compiler
# knows of pointers and strides: divisible by 16 or not.
WITHOUT_SUMS = ("rotary", "adamw_")
# In Triton what is not refused on the card here, for whole models.
EVERYTHING = ",".join(["torch", *(f"{name}=triton" for name in KERNELS if not tiny.refused(name))])


def small_cases():
    return [
        pytest.param(name, case, id=f"{name}-{key}")
        for name in KERNELS
        for key, case in OPS[name].cases.items()
        if OPS[name].bytes(case, torch.float32) <= LARGEST
    ]


def answers(name, inputs, implementation, upcast=False):
    """Results, in-place results and gradients of a call; the gradients are of random directions, always the same."""
    op = OPS[name]
    inputs = {key: value.clone() if torch.is_tensor(value) else value for key, value in inputs.items()}
    if upcast:
        for key, value in inputs.items():
            if torch.is_tensor(value) and value.is_floating_point():
                inputs[key] = value.double()
            elif isinstance(value, torch.dtype):
                inputs[key] = torch.float64
    for key in op.differentiable:
        if inputs.get(key) is not None:
            inputs[key].requires_grad_()
    with kernels.use(f"torch,{name}={implementation}"):
        result = op.fn(**inputs)
        outputs = tensors(result)
        learnt = [output for output in outputs if output.requires_grad]
        if learnt:
            generator = torch.Generator().manual_seed(7)
            draw = lambda x: torch.randn(x.shape, generator=generator).to(x)
            sum((output * draw(output)).sum() for output in learnt).backward()
    grads = [inputs[key].grad for key in op.differentiable if inputs.get(key) is not None]
    return [output.detach() for output in outputs] + [inputs[key] for key in op.mutates] + grads


def error(found, exact, least=0.0):
    """Relative to the exact answer's norm, or to `least` where that is more; where both are zero, to numbers of size 1,
    as what cancelled to it is made of."""
    scale = max(exact.double().norm().item(), least)
    one = math.sqrt(max(exact.numel(), 1))
    return (found.double() - exact.double()).norm().item() / (scale if scale > 1e-9 else one)


def uncancelled(name, inputs):
    """Norms of the exact answers to other targets. A loss is log-sum-exp − logit, its gradient softmax − onehot: where
    a prediction is right both are small, and as exact as what they are the difference of, which these norms tell.
    """
    targets = inputs["targets"]
    vocab = inputs["weight"].size(0) if "weight" in inputs else inputs["logits"].size(1)
    others = torch.where(targets >= 0, (targets + 1) % vocab, targets)
    return [answer.norm().item() for answer in answers(name, dict(inputs, targets=others), "torch", upcast=True)]


def check(name, inputs, dtype):
    """The kernel's error is at most twice PyTorch's in the same dtype, and a floor."""
    found, usual, exact = (
        answers(name, inputs, "triton"),
        answers(name, inputs, "torch"),
        answers(name, inputs, "torch", upcast=True),
    )
    assert len(found) == len(usual) == len(exact)
    least = uncancelled(name, inputs) if "targets" in inputs else [0.0] * len(exact)
    for i, (a, b, c, terms) in enumerate(zip(found, usual, exact, least)):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert a.isnan().sum() == c.isnan().sum()
        if not c.isnan().any():
            floor = (
                FLIPS if name.startswith("fp8") else FLOOR[dtype] * (20 if c.numel() == 1 else 1)
            )  # one sum of everything, whose terms cancel
            allowed, off = FORWARD_ERROR.get(name, 2) * error(b, c, terms) + floor, error(a, c, terms)
            assert off <= allowed, f"{name}: result {i} is off by {off:.1e}, allowed {allowed:.1e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, case", small_cases())
def test_error_at_most_twice_that_of_pytorch(name, case, dtype):
    if dtype == torch.float16 and name in NOT_IN_FLOAT16:
        with kernels.use("triton"), pytest.raises(ValueError, match=f"{name}: .*float16, {NOT_IN_FLOAT16[name]}"):
            OPS[name].fn(**OPS[name].inputs(case, dtype, DEVICE))
        return
    tiny.skip_refused(name, dtype)
    check(name, OPS[name].inputs(case, dtype, DEVICE), dtype)


# ---- what memory may look like

ODD = {name: OPS[name].cases[next(key for key in OPS[name].cases if key.startswith("odd"))] for name in KERNELS}
if "flash_attention" in ODD:  # the others' launches take the interpreter four times as long
    ODD["flash_attention"] = OPS["flash_attention"].cases["odd_longer"]


def strided(x):
    """The same values, every other element of a tensor twice as long."""
    return x.unsqueeze(-1).expand(*x.shape, 2).contiguous()[..., 0]


def misaligned(x):
    """The same values, contiguous, one element after an aligned address."""
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


@pytest.mark.parametrize("lay_out", [strided, misaligned])
@pytest.mark.parametrize("name", KERNELS)
def test_strided_and_misaligned_inputs(name, lay_out):
    """The same bits; but for rounding, where sums are added up in another order."""
    tiny.skip_refused(name)
    op = OPS[name]
    inputs = op.inputs(ODD[name], torch.float32, DEVICE)
    exact = answers(name, inputs, "triton")
    moved = {
        key: lay_out(value) if torch.is_tensor(value) and value.ndim and key not in op.mutates else value
        for key, value in inputs.items()
    }
    for key in op.differentiable:
        moved[key] = moved[key].detach().requires_grad_()
    with kernels.use(f"torch,{name}=triton"):
        result = op.fn(**moved)
    for a, b in zip(tensors(result) + [moved[key] for key in op.mutates], exact):
        assert alike(name, a, b), f"{name}: off by {error(a, b):.1e}"


def alike(name, a, b, interpreted=triton_utils.INTERPRETED):
    """Whether two answers of float32 kernels to the same values, laid out differently, are one answer."""
    if name in FORWARD_ERROR:
        return error(a, b) < 1e-5  # torch adds up the norm of a strided matrix in another order
    if interpreted or name in WITHOUT_SUMS:
        return torch.equal(a, b)
    rounded = name.startswith("fp8")
    return a.shape == b.shape and error(a.float(), b.float()) < (FLIPS if rounded else 4 * FLOOR[torch.float32])


def test_sums_may_be_rounded_otherwise_on_a_card_and_nothing_else_may():
    a = torch.linspace(1, 2, 100)
    b = a * (1 + 2**-23)
    assert [alike(name, a, b, interpreted=False) for name in ("rms_norm", "rotary", "adamw_")] == [True, False, False]
    assert not alike("rms_norm", a, b, interpreted=True) and not alike("rms_norm", a, 1.0001 * a, interpreted=False)


def test_what_is_compared_to_the_bit_on_a_card_adds_nothing_up():
    where = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "NANOCHAT_KERNELS")}
    root = Path(__file__).parent.parent
    where["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    where["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, str(root / "tests" / "sums.py"), *WITHOUT_SUMS, "rms_norm"]
    made = subprocess.run(command, env=where, cwd=root, capture_output=True, text=True)
    assert made.returncode == 0 and made.stdout.split() == ["rms_norm"], made.stdout + made.stderr[-2000:]


def test_what_is_changed_in_place_must_be_contiguous():
    for name in ("adamw_", "muon_momentum_", "muon_update_"):
        op = OPS[name]
        inputs = op.inputs(ODD[name], torch.float32, DEVICE)
        first = op.mutates[0]
        inputs[first] = strided(inputs[first])
        with kernels.use("triton"), pytest.raises(ValueError, match=f"{name}: .*not contiguous"):
            op.fn(**inputs)


def test_logits_of_a_padded_vocabulary_are_not_copied():
    wide = torch.randn(9, 128, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    targets = torch.arange(9, device=DEVICE)
    with kernels.use("triton"):
        part = kernels.cross_entropy(wide[:, :101], targets, 15.0, reduction="none")
        whole = kernels.cross_entropy(wide[:, :101].contiguous(), targets, 15.0, reduction="none")
    assert alike("cross_entropy", part, whole)


EMPTY = {
    "embedding": dict(N=0, V=5, C=8),
    "rms_norm": dict(N=0, C=8), "mix_rms_norm": dict(N=0, C=8), "add_rms_norm": dict(N=0, C=8),
    "rotary": dict(B=0, T=4, H=2, K=1, D=8), "qk_norm_rotary": dict(B=2, T=0, H=2, K=1, D=8),
    "polar_express": dict(K=0, m=4, n=6), "newton_schulz": dict(K=0, m=4, n=6), "adamw_": dict(N=0),
    "muon_momentum_": dict(K=0, m=4, n=6), "muon_update_": dict(K=0, m=4, n=6),
    "fp8_mix_rms_norm": dict(N=0, C=8), "fp8_linear": dict(N=0, C=16, F=16), "fp8_mlp_relu2": dict(N=0, C=16, F=16),
}  # fmt: skip


@pytest.mark.parametrize("name", EMPTY)
def test_empty_inputs(name):
    tiny.skip_refused(name)
    inputs = OPS[name].inputs(EMPTY[name], torch.float32, DEVICE)
    for a, b in zip(answers(name, inputs, "triton"), answers(name, inputs, "torch")):
        assert a.shape == b.shape and torch.equal(a, b)


@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [None, 15.0])
def test_losses_reductions_softcap_and_ignored_rows(name, reduction, softcap):
    inputs = OPS[name].inputs(ODD[name], torch.float32, DEVICE)
    inputs.update(softcap=softcap, reduction=reduction, ignore_index=7)
    inputs["targets"] = inputs["targets"].clamp_min(0)
    inputs["targets"][::3] = 7
    check(name, inputs, torch.float32)
    inputs["targets"][:] = 7
    check(name, inputs, torch.float32)  # the mean of nothing is NaN, and so are its gradients
    none = {key: value[:0] if key in ("x", "logits", "targets") else value for key, value in inputs.items()}
    with kernels.use("triton"):
        result = OPS[name].fn(**none)
    assert result.isnan() if reduction == "mean" else result.sum() == 0


def test_extreme_logits():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e30, -1e30, -1e30], [3e37, 0.0, 0.0], [-math.inf, 0.0, 1.0]]).to(DEVICE)
    targets = torch.tensor([0, 1, 0, 2], device=DEVICE)
    with kernels.use("triton"):
        found = kernels.cross_entropy(logits, targets, reduction="none")
    assert torch.allclose(found, torch.nn.functional.cross_entropy(logits, targets, reduction="none"))


@pytest.mark.skipif(DEVICE == "cpu", reason="on CPUs such a target is an error before any kernel runs; no GPU here")
def test_a_target_outside_the_vocabulary_gives_nan_on_a_gpu():
    logits = torch.randn(4, 10, device=DEVICE, requires_grad=True)
    targets = torch.tensor([0, 10, -5, 9], device=DEVICE)
    with kernels.use("triton"):
        losses = kernels.cross_entropy(logits, targets, reduction="none")
    losses.sum().backward()
    assert losses.isnan().tolist() == [False, True, True, False]
    assert logits.grad.isnan().any(1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("name", KERNELS)
def test_twice_the_same_bits(name):
    tiny.skip_refused(name)
    inputs = OPS[name].inputs(ODD[name], torch.float32, DEVICE)
    for a, b in zip(answers(name, inputs, "triton"), answers(name, inputs, "triton")):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", [name for name in KERNELS if OPS[name].differentiable])
def test_backward_twice_gives_the_same(name):
    tiny.skip_refused(name)
    op = OPS[name]
    inputs = op.inputs(ODD[name], torch.float32, DEVICE)
    leaves = [inputs[key].requires_grad_() for key in op.differentiable]
    with kernels.use("triton"):
        result = op.fn(**inputs)
        total = sum((output**2).sum() for output in tensors(result) if output.requires_grad)
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    second = torch.autograd.grad(total, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_offsets_past_two_to_the_31(tmp_path, request):
    """Rows over 2³¹ elements apart: on a card that has 5 GiB to spare, and in the interpreter everywhere."""
    elements = 2**31 + 4096
    if triton_utils.INTERPRETED:  # a sparse file: only what is touched takes memory
        with open(tmp_path / "sparse", "wb") as file:
            file.truncate(2 * elements)
        far_apart(torch.from_file(str(tmp_path / "sparse"), shared=True, size=elements, dtype=torch.float16))
        return
    if torch.cuda.mem_get_info()[0] > 5 << 30:
        far_apart(torch.zeros(elements, dtype=torch.float16, device=DEVICE))
    tiny.interpreted_elsewhere(request)


def far_apart(x):
    rows = x[: x.numel() // 2048 * 2048].view(-1, 2048)
    rows[-1] = torch.randn(2048, generator=torch.Generator().manual_seed(0)).half()
    logits = rows[:: len(rows) - 1]  # the first row and the last, a stride of over 2³¹ between them
    assert logits.stride(0) > 2**31 - 1
    targets = torch.tensor([5, 6], device=x.device)
    with kernels.use("triton"):
        found = kernels.cross_entropy(logits, targets, reduction="none")
    exact = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    assert torch.allclose(found.double(), exact, atol=1e-5)


# ---- as PyTorch operators


SLOWEST = [pytest.param(name, marks=pytest.mark.slow) for name in ("flash_attention",)]


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "flash_attention"] + SLOWEST)
def test_opcheck(name):
    """torch's own checks of every operator that a call of the op uses: schema, fake tensors, autograd."""
    tiny.skip_refused(name)
    operators = {}

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == triton_utils.NAMESPACE and func not in operators:
                copies = [a.detach().clone() if torch.is_tensor(a) else a for a in args]
                operators[func] = copies, dict(kwargs or {})
            return func(*args, **(kwargs or {}))

    with Watch():
        answers(name, OPS[name].inputs(ODD[name], torch.float32, DEVICE), "triton")
    assert operators
    for func, (args, kwargs) in operators.items():
        opcheck(func, tuple(args), kwargs)


def whole(name, backend):
    """Answers of a compiled call, which must be one graph."""
    tiny.skip_refused(name)
    op = OPS[name]

    def results(function):
        inputs = op.inputs(ODD[name], torch.float32, DEVICE)
        for key in op.differentiable:
            inputs[key].requires_grad_()
        result = function(**inputs)
        outputs = tensors(result)
        if op.differentiable:
            sum((output**2).sum() for output in outputs if output.requires_grad).backward()
        return [*outputs, *(inputs[key] for key in op.mutates), *(inputs[key].grad for key in op.differentiable)]

    torch._dynamo.reset()
    with kernels.use(f"torch,{name}=triton"):
        compiled = torch.compile(op.fn, fullgraph=True, backend=backend)
        for a, b in zip(results(compiled), results(op.fn)):
            assert error(a, b) < 1e-5


# By default test_dynamic.py traces the others, of every size.
FIXED = ("mix_rms_norm", "linear_cross_entropy", "muon_update_", "fp8_linear")


@pytest.mark.parametrize(
    "name", [name if name in FIXED else pytest.param(name, marks=pytest.mark.slow) for name in KERNELS]
)
def test_traced_whole(name):
    whole(name, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_compiled_whole(name):
    whole(name, "inductor")


def test_another_setting_compiles_again():
    x = torch.randn(4, 8, device=DEVICE)
    torch._dynamo.reset()
    seen = []

    def backend(graph, inputs):
        seen.append(any(triton_utils.NAMESPACE in str(node.target) for node in graph.graph.nodes))
        return graph

    compiled = torch.compile(lambda x: kernels.rms_norm(x), backend=backend)
    for setting in ("torch", "triton", "torch", "triton"):
        with kernels.use(setting):
            compiled(x)
    assert seen == [False, True]


# ---- a whole model


def losses_of_training(setting, steps=4):
    model = tiny.model().to(DEVICE)
    optimizer = model.setup_optimizer(matrix_lr=0.02)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        ids = torch.randint(300, (2, 33), generator=generator).to(DEVICE)
        with kernels.use(setting):
            loss = model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
            loss.backward()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_a_model_trains_alike_on_kernels_and_on_pytorch():
    mine, theirs = losses_of_training(EVERYTHING), losses_of_training("torch")
    assert mine != theirs  # else nothing ran in Triton
    assert max(abs(a - b) for a, b in zip(mine, theirs)) < 1e-4
    assert abs(mine[-1] - mine[0]) > 0.01  # the steps did something


def test_a_model_is_traced_whole_with_kernels():
    model: GPT = tiny.model().to(DEVICE)
    ids = torch.randint(300, (2, 32), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    torch._dynamo.reset()
    with kernels.use(EVERYTHING):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        loss = compiled(ids, ids)
        loss.backward()
        grads = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        eager = model(ids, ids)
        eager.backward()
    assert abs(loss.item() - eager.item()) < 1e-5
    for a, b in zip(grads, (parameter.grad for parameter in model.parameters())):
        assert error(a, b) < 1e-4


def test_the_engine_says_the_same_on_kernels():
    """Greedy tokens with the KV cache: prefill and decode, rows of different lengths."""
    from nanochat.engine import Engine, Request, Sampling

    model = tiny.model().to(DEVICE)
    prompts = [[5, 6, 7], [9], [3] * 20]

    def loss_under(setting):
        with kernels.use(setting):
            engine = Engine(model, slots=3)
            requests = [engine.submit(Request(prompt, 8, Sampling(0.0))) for prompt in prompts]
            tokens = {id(request): [] for request in requests}
            while not engine.idle:
                for request, token in engine.step():
                    tokens[id(request)].append(token)
            return [tokens[id(request)] for request in requests]

    assert loss_under(EVERYTHING) == loss_under("torch")


@pytest.mark.parametrize("name", KERNELS)
def test_no_shape_in_a_compiled_graph_is_made_of_block_sizes(name, monkeypatch):
    """Inductor's cache on disk knows nothing of them: after tuning it would give code for the shapes of before."""
    config, made = tuned.config, []

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func.namespace == triton_utils.NAMESPACE:
                made.append((func.name(), [(x.shape, x.stride()) for x in tree_leaves(out) if x is not None]))
            return out

    def shapes(factor):
        blocks = lambda key: key == "BLOCK" or "elements" in key or key == "BLOCK_N"
        more = lambda *of: {key: n * factor if blocks(key) else n for key, n in config(*of).items()}
        monkeypatch.setattr(tuned, "config", more)
        made.clear()
        with Shapes():
            targets.all_launches(OPS[name], OPS[name].cases["d4" if "d4" in OPS[name].cases else "odd"], dtype, "sm_90")
        return list(made)

    dtype = torch.float32 if name == "adamw_" else torch.bfloat16
    usual = shapes(1)
    assert usual and shapes(4) == usual
