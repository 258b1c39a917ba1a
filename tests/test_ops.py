"""Every registered op: forward and backward against float64, and the float64 reference against another formula."""

import math

import pytest
import torch
from torch.autograd import gradcheck

import kernels
from kernels import OPS
from kernels.fp8.quantize import E4M3
from kernels.registry import tensors

LARGEST = 8 << 20  # bytes of a case that a CPU test takes on
TINY = {  # shapes for gradcheck, which evaluates an op once per input element
    "rms_norm": dict(N=3, C=5),
    "mix_rms_norm": dict(N=3, C=5),
    "add_rms_norm": dict(N=3, C=5),
    "rotary": dict(B=1, T=3, H=2, K=1, D=4),
    "qk_norm_rotary": dict(B=1, T=3, H=2, K=1, D=4),
    "cross_entropy": dict(N=5, V=7),
    "linear_cross_entropy": dict(N=5, V=7, C=3),
    "linear_relu2": dict(N=3, C=4, F=5),
    "mlp_relu2": dict(N=3, C=4, F=5),
    "flash_attention": dict(B=1, T=5, H=2, K=1, D=3, W=2),
    "embedding": dict(N=7, V=4, C=3),
}


def small_cases():
    return [
        pytest.param(op, case, id=f"{op.name}-{name}")
        for op in OPS.values()
        for name, case in op.cases.items()
        if op.bytes(case, torch.float32) <= LARGEST
    ]


def run(op, case, dtype, upcast=False):
    """(results, with in-place results) of a call on inputs made in `dtype`, computed in float64 when upcast."""
    inputs = op.inputs(case, dtype, "cpu")
    if upcast:
        inputs = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
        inputs = {k: torch.float64 if isinstance(v, torch.dtype) else v for k, v in inputs.items()}
    result = op.fn(**inputs)
    return tensors(result) + [inputs[name] for name in op.mutates], inputs


def error(found, exact):
    """Relative to the exact answer; to 1 per element where that is (as good as) zero."""
    norm, one = exact.double().norm(), math.sqrt(exact.numel())
    return ((found.double() - exact.double()).norm() / (norm if norm > 1e-6 * one else one)).item()


# ---- the reference in float64 against other formulas


def rms(x):
    return x / (x.pow(2).sum(-1, keepdim=True) / x.size(-1) + 2**-52).sqrt()


def turned(x, cos, sin):
    """Rotary as a multiplication of complex numbers by e^(−iθ)."""
    half = x.size(-1) // 2
    z = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, -sin)[:, None, :]
    return torch.cat((z.real, z.imag), -1)


def capped_loss(logits, targets, softcap):
    z = softcap * torch.tanh(logits / softcap)
    losses = [-torch.log_softmax(z[n], 0)[t] for n, t in enumerate(targets.tolist()) if t != -1]
    return torch.stack(losses).mean()


def masked_attention(q, k, v, causal, window):
    B, T, H, D = q.shape
    S = k.size(1)
    k, v = (x.repeat_interleave(H // x.size(2), 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(D)
    i, j = torch.arange(T)[:, None] + S - T, torch.arange(S)[None]
    seen = (j <= i) & (j >= i - (S if window is None else window))
    p = torch.softmax(scores.masked_fill(~seen, -math.inf), -1).nan_to_num(0.0)  # who sees nothing gets nothing
    return torch.einsum("bhij,bjhd->bihd", p, v)


def decoded(q, k_cache, v_cache, start, window):
    out = torch.zeros_like(q)
    group = q.size(2) // k_cache.size(2)
    for b in range(q.size(0)):
        for t in range(q.size(1)):
            end = int(start[b]) + t
            first = 0 if window is None else max(0, end - window)
            for h in range(q.size(2)):
                keys, values = k_cache[b, first : end + 1, h // group], v_cache[b, first : end + 1, h // group]
                out[b, t, h] = torch.softmax(keys @ q[b, t, h] / math.sqrt(q.size(3)), 0) @ values
    return out


def orthogonalised(coefficients):
    def one(g):
        m, n = g.shape
        scale = 1.01 * g.norm() + 1e-6 if len(set(coefficients)) > 1 else g.norm() + 1e-7
        u, s, v = torch.linalg.svd(g, full_matrices=False)
        s = s / scale
        for a, b, c in coefficients:  # the odd polynomial acts on the singular values alone
            s = a * s + b * s**3 + c * s**5
        return u @ torch.diag(s) @ v

    return lambda g, steps=5: torch.stack([one(matrix) for matrix in g])


def adamw(param, grad, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay):
    """torch's own, put where the moments are."""
    p = torch.nn.Parameter(param.clone())
    optimizer = torch.optim.AdamW([p], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay)
    state = dict(step=torch.tensor(step - 1.0), exp_avg=exp_avg.clone(), exp_avg_sq=exp_avg_sq.clone())
    optimizer.state[p] = state
    p.grad = grad
    optimizer.step()
    return [p.detach(), state["exp_avg"], state["exp_avg_sq"]]


def muon_momentum(grad, momentum_buffer, momentum, dtype):
    buffer = torch.lerp(momentum_buffer, grad, 1 - momentum)
    g = torch.lerp(grad, buffer, momentum)
    rows = []
    for matrix in g:
        target = matrix.norm() / math.sqrt(matrix.size(0))
        rows.append(torch.stack([row / max(row.norm(), 1e-6) * target for row in matrix]))
    return [torch.stack(rows), buffer]


def muon_update(param, update, second_moment, lr, weight_decay, beta2):
    params, moments = [], []
    for p, x, s in zip(param, update, second_moment):
        m, n = x.shape
        x = x / x.norm() * math.sqrt(min(m, n))
        dim, size = (1, n) if m >= n else (0, m)
        v = (x**2).mean(dim, keepdim=True)
        s = s + (v - s) * (1 - beta2)
        scale = 1 / s.clamp_min(1e-10).sqrt()
        y = x * scale * ((v * size).sum().sqrt() / (v * size * scale**2).sum().sqrt())
        params.append(torch.where(y * p >= 0, p - lr * y - lr * weight_decay * p, p - lr * y))
        moments.append(s)
    return [torch.stack(params), torch.stack(moments)]


ORACLES = {
    "rms_norm": lambda x, weight: rms(x) * weight,
    "mix_rms_norm": lambda *args, **named: [mixed(*args, **named), rms(mixed(*args, **named))],
    "add_rms_norm": lambda x, delta: [x + delta, rms(x + delta)],
    "rotary": turned,
    "qk_norm_rotary": lambda q, k, cos, sin, scale: [rms(turned(z, cos, sin)) * scale for z in (q, k)],
    "cross_entropy": lambda logits, targets, softcap: capped_loss(logits, targets, softcap),
    "linear_cross_entropy": lambda x, weight, targets, softcap: capped_loss(x @ weight.T, targets, softcap),
    "linear_relu2": lambda x, weight: torch.einsum("nc,fc->nf", x, weight).clamp_min(0) ** 2,
    "mlp_relu2": lambda x, w1, w2: torch.einsum("nf,cf->nc", torch.einsum("nc,fc->nf", x, w1).clamp_min(0) ** 2, w2),
    "flash_attention": masked_attention,
    "flash_attention_decode": decoded,
    "polar_express": orthogonalised(kernels.newton_schulz.__globals__["POLAR_EXPRESS"]),
    "newton_schulz": orthogonalised([kernels.newton_schulz.__globals__["QUINTIC"]] * 5),
    "embedding": lambda tokens, weight: torch.eye(weight.size(0), dtype=weight.dtype)[tokens] @ weight,
    "adamw_": adamw,
    "muon_momentum_": muon_momentum,
    "muon_update_": muon_update,
    "fp8_linear": lambda x, weight: rounded(x, E4M3) @ rounded(weight, E4M3).T,
    "fp8_mlp_relu2": lambda x, w1, w2: (
        rounded((rounded(x, E4M3) @ rounded(w1, E4M3).T).clamp_min(0) ** 2, E4M3) @ rounded(w2, E4M3).T
    ),
    "fp8_mix_rms_norm": lambda *args, **named: with_copies(mixed(*args, **named)),
    "fp8_add_rms_norm": lambda x, delta: with_copies(x + delta),
}


def mixed(x, x0, a, b, delta, index):
    return a[index] * (x + delta) + b[index] * x0


def with_copies(x):
    inverse = torch.tensor(math.sqrt(x.size(-1)) / 448)
    values = (rms(x).float() / inverse).to(E4M3).double()
    return [x, rms(x), values, values.T, inverse]


def rounded(x, dtype):
    scale = torch.finfo(dtype).max / x.abs().max().float()
    return (x.float() * scale).to(dtype).double() / scale.double()


def test_every_public_op_is_registered_and_has_an_oracle():
    public = {name for name in kernels.__all__ if callable(getattr(kernels, name)) and name[0].islower()}
    public -= {"use", "describe"}
    assert public == set(OPS) == set(ORACLES)
    differentiable = {op.name for op in OPS.values() if op.differentiable and op.name[:3] != "fp8"}
    assert differentiable == set(TINY)


@pytest.mark.parametrize("op, case", small_cases())
def test_the_reference_is_the_formula(op, case):
    inputs = op.inputs(case, torch.float64, "cpu")
    exact = ORACLES[op.name](**inputs)
    found, _ = run(op, case, torch.float64)
    exact = list(exact) if isinstance(exact, (list, tuple)) else [exact]
    assert len(found) == len(exact)
    for a, b in zip(found, exact):
        assert a.shape == b.shape
        assert error(a, b) < (
            1e-3 if op.name[:3] == "fp8" else 1e-9
        )  # fp8 multiplies in float32: a rare rounding flips


UNROUNDED = {"fp8_linear": torch.nn.functional.linear, "fp8_mlp_relu2": ORACLES["mlp_relu2"]}


# ---- in float32, bfloat16, float16 against float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op, case", small_cases())
def test_error_against_float64(op, case, dtype):
    if why := op.refuses(dtype):
        pytest.skip(why)
    found, inputs = run(op, case, dtype)
    if op.name in ("fp8_linear", "fp8_mlp_relu2"):  # their exact answer is the one without rounding
        exact = [UNROUNDED[op.name](*(value.double() for value in inputs.values()))]
    else:
        exact, _ = run(op, case, dtype, upcast=True)
    for a, b in zip(found, exact):
        assert not a.isnan().any()
        assert error(a, b) <= op.tolerance[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op, case", [p for p in small_cases() if p.values[0].differentiable])
def test_gradient_error_against_float64(op, case, dtype):
    if why := op.refuses(dtype):
        pytest.skip(why)

    def gradients(upcast):
        outputs, inputs = [], op.inputs(case, dtype, "cpu")
        for name, value in inputs.items():
            if torch.is_tensor(value) and value.is_floating_point():
                inputs[name] = (value.double() if upcast else value).requires_grad_(name in op.differentiable)
        result = op.fn(**inputs)
        outputs = [output for output in tensors(result) if output.requires_grad]
        generator = torch.Generator().manual_seed(9)
        loss = sum((o * torch.randn(o.shape, generator=generator).to(o.dtype)).sum() for o in outputs)
        return torch.autograd.grad(loss, [inputs[name] for name in op.differentiable])

    for name, a, b in zip(op.differentiable, gradients(False), gradients(True)):
        allowed = 6 * op.tolerance[dtype] + (2e-2 if op.name[:3] == "fp8" else 0)
        assert error(a, b) <= allowed, name


@pytest.mark.parametrize("name", TINY)
def test_gradcheck(name):
    op = OPS[name]
    inputs = op.inputs(TINY[name], torch.float64, "cpu")
    wrt = [
        v.double().requires_grad_() if torch.is_tensor(v) and k in op.differentiable else v for k, v in inputs.items()
    ]

    def call(*values):
        return op.fn(**dict(zip(inputs, values)))

    assert gradcheck(call, wrt)
    for reduction in ("sum", "none") if "cross_entropy" in name else ():
        assert gradcheck(lambda *values, r=reduction: op.fn(**dict(zip(inputs, values)), reduction=r), wrt)


@pytest.mark.parametrize("name", TINY)
def test_inputs_are_left_alone_strides_do_not_matter_and_it_repeats_bitwise(name):
    op = OPS[name]
    case = TINY[name]
    inputs, copy = op.inputs(case, torch.float32, "cpu"), op.inputs(case, torch.float32, "cpu")
    first, second = op.fn(**inputs), op.fn(**inputs)
    strided = {
        k: v.unsqueeze(-1).expand(*v.shape, 2).contiguous()[..., 0] if torch.is_tensor(v) and v.ndim else v
        for k, v in inputs.items()
    }
    third = op.fn(**strided)
    for a, b, c in zip(tensors(first), tensors(second), tensors(third)):
        assert torch.equal(a, b)
        assert error(c, a) < 1e-6
    for key, value in copy.items():
        assert not torch.is_tensor(value) or torch.equal(value, inputs[key])


@pytest.mark.slow
@pytest.mark.parametrize("name", OPS)
def test_compiled_whole_it_gives_the_same(name):
    op = OPS[name]
    case = next(iter(op.cases.values()))
    compiled = torch.compile(op.fn, fullgraph=True)

    def results(fn):
        inputs = op.inputs(case, torch.float32, "cpu")
        for key in op.differentiable:
            inputs[key].requires_grad_()
        result = fn(**inputs)
        outputs = tensors(result)
        if op.differentiable:
            sum((o * o).sum() for o in outputs if o.requires_grad).backward()
        grads = [inputs[key].grad for key in op.differentiable]
        return [*outputs, *(inputs[key] for key in op.mutates), *grads]

    torch._dynamo.reset()
    for a, b in zip(results(compiled), results(op.fn)):
        assert error(a, b) < 10 * op.tolerance[torch.float32]
