"""Embedding gradients that are added where they are kept: what is special to that op."""

import pytest
import tiny
import torch

import kernels
from kernels import triton_utils

SETTINGS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(
    not triton_utils.INSTALLED, reason="Triton is not installed, so no kernel can run"))]  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def looked_up(setting, tokens, weight, dy, gradient=None):
    weight = weight.clone().requires_grad_()
    with kernels.use(f"torch,embedding={setting}"):
        kernels.embedding(tokens, weight, gradient).backward(dy)
    return weight.grad


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_kept_gradient_is_added_to_and_autograd_gets_none(setting):
    tokens = torch.randint(11, (3, 50), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    weight, dy, before = draw(11, 7), draw(3, 50, 7, seed=2), draw(11, 7, seed=3)
    kept = before.clone()
    for _ in range(2):
        assert looked_up(setting, tokens, weight, dy, kept) is None
    exact = before.double().index_add(0, tokens.flatten(), 2 * dy.double().view(-1, 7))
    assert ((kept - exact).norm() / exact.norm()).item() < 2e-7
    once = looked_up(setting, tokens, weight, dy)
    assert ((once - (exact - before.double()) / 2).norm() / exact.norm()).item() < 2e-7


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("tokens", [[4] * 500, [0] * 63 + [1] * 2 + [2] * 63, [3] * 64 + [9] * 64, [9] * 65 + [0]],
                         ids=["one token", "across a block", "whole blocks", "to the end"])  # fmt: skip
def test_runs_of_any_length(setting, tokens):
    """Rows of ones: a token's gradient is its count; what occurs nowhere keeps its gradient."""
    tokens = torch.tensor(tokens, device=DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        kept = torch.full((10, 3), 0.5, device=DEVICE, dtype=dtype)
        looked_up(setting, tokens, kept, torch.ones(len(tokens), 3, device=DEVICE, dtype=dtype), kept)
        exact = (torch.bincount(tokens, minlength=10).float() + 0.5)[:, None].expand(10, 3)
        assert torch.equal(kept, exact.to(dtype))


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_nan_spreads_no_further_than_the_runs_of_a_block(setting):
    """Runs of 1 to 96 rows, in each of which in turn the last row is NaN."""
    lengths = torch.arange(1, 101, 5)
    tokens, ends = torch.repeat_interleave(torch.arange(20), lengths).to(DEVICE), lengths.cumsum(0)
    block = (ends - lengths) // 64  # in which a run begins
    for token, end in enumerate(ends.tolist()):
        kept = torch.zeros(20, 2, device=DEVICE, dtype=torch.bfloat16)
        dy = torch.ones(len(tokens), 2, device=DEVICE, dtype=torch.bfloat16)
        dy[end - 1] = float("nan")
        looked_up(setting, tokens, kept, dy, kept)
        found = set(kept.isnan().any(1).nonzero().flatten().tolist())
        together = set((block == block[token]).nonzero().flatten().tolist())
        assert token in found and found <= (together if setting == "triton" else {token})


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_frequent_word_in_bfloat16_loses_nothing(setting):
    """2,000 times 2⁻⁸ after a 1: added one by one in bfloat16, every one of them would be rounded away."""
    dy = torch.full((2001, 2), 2.0**-8, device=DEVICE, dtype=torch.bfloat16)
    dy[0] = 1
    kept = torch.zeros(3, 2, device=DEVICE, dtype=torch.bfloat16)
    looked_up(setting, torch.zeros(2001, dtype=torch.int64, device=DEVICE), kept, dy, kept)
    assert torch.equal(kept[0], torch.full((2,), 1 + 2000 / 256, device=DEVICE).bfloat16())


@pytest.mark.parametrize(
    "tokens, weight, gradient, message",
    [
        (torch.zeros(3).long(), torch.zeros(4), None, r"weight is \(4,\), wanted \(V, C\)"),
        (torch.zeros(3), torch.zeros(4, 2), None, "tokens are torch.float32, wanted torch.int64"),
        (torch.zeros(3).long(), torch.zeros(4, 2), torch.zeros(4, 3), r"gradient is \(4, 3\) .* wanted .* \(4, 2\)"),
        (torch.zeros(3).long(), torch.zeros(4, 2), torch.zeros(4, 2).half(), "gradient is .* torch.float16, wanted"),
        (
            torch.zeros(3).long(),
            torch.zeros(4, 2),
            torch.zeros(2, 4).T,
            "gradient is .* not contiguous, wanted contiguous",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tokens, weight, gradient, message):
    with pytest.raises(ValueError, match=f"embedding: {message}"):
        kernels.embedding(tokens, weight, gradient)


def trained(kept, setting="torch", run=lambda model: model):
    """(losses and gradients, weights) of three steps of two micro-batches."""
    batches = torch.randint(300, (3, 2, 4, 33), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    model = tiny.model().to(DEVICE)
    optimizer = model.setup_optimizer(weight_decay=0.1)
    if kept:
        model.keep_gradients(optimizer)
    runs, found = run(model), []
    with kernels.use(f"torch,embedding={setting}"):
        for step in batches:
            for ids in step:
                loss = runs(ids[:, :-1], ids[:, 1:]) / 2
                loss.backward()
                found.append(loss.detach())
            found += [p.grad.clone() for p in model.parameters()]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    head = model.lm_head
    assert head.weight.grad is head.gradient and (head.gradient is not None) == kept
    for table in model.tables():
        assert table.weight.grad is table.gradient and (table.gradient is not None) == kept
        assert not kept or not table.gradient.any()
    return found, list(model.state_dict().values())


def check_same(found, usual):
    for a, b in zip(found, usual, strict=True):
        assert ((a - b).norm() / b.norm().clamp_min(1e-3)).item() < 1e-4


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_model_learns_the_same(setting):
    usual, found = trained(False), trained(True, setting)
    if setting == "torch" and DEVICE == "cpu":  # a card adds up in an order of its own
        assert all(torch.equal(a, b) for part in (0, 1) for a, b in zip(found[part], usual[part], strict=True))
    check_same(found[0], usual[0])


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_compiled_whole_it_learns_the_same_and_sorts_once(setting):
    sorts = []

    def count(graph):
        sorts.append(sum("sort" in str(node.target) for node in graph.nodes))

    with torch._inductor.config.patch(post_grad_custom_post_pass=count, fx_graph_cache=False):
        found, _ = trained(True, setting, lambda model: torch.compile(model, dynamic=False, fullgraph=True))
    check_same(found, trained(False)[0])
    assert sum(sorts) == (1 if setting == "triton" else 0)
