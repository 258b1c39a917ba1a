"""Validation: eager and compiled."""

import math

import pytest
import tiny
import torch

from nanochat.data.loader import Batch, LoaderState
from nanochat.data.source import Position
from nanochat.evaluate.bits_per_byte import bits_per_byte, score
from nanochat.hardware import can_compile


def batches(count=3):
    torch.manual_seed(0)
    for _ in range(count):
        ids = torch.randint(300, (2, 33))
        targets = ids[:, 1:].clone()
        targets[:, ::7] = -1
        yield Batch(ids[:, :-1], targets, LoaderState(Position(), []))


def sizes():
    return (torch.arange(300) % 5).to(torch.int64)  # some tokens stand for no text


def test_it_is_nats_over_bytes():
    model = tiny.model().eval()
    nats, size = 0.0, 0
    for batch in batches():
        losses = model(batch.inputs, batch.targets, loss_reduction="none")
        for loss, target in zip(losses.flatten().tolist(), batch.targets.flatten().tolist()):
            if target >= 0 and target % 5:
                nats, size = nats + loss, size + target % 5
    assert bits_per_byte(model, batches(), sizes()) == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert math.isnan(bits_per_byte(model, [], sizes()))


@pytest.mark.parametrize("fp8", [False, True])
def test_compiled_evaluation_and_training_do_not_compile_each_other_anew(fp8):
    """Two graphs forward: one of training, one of evaluation; each is compiled once, whoever comes first."""
    compiled = []

    def counting(graph, inputs):
        compiled.append("training" if torch.is_grad_enabled() else "evaluation")
        return graph

    torch._dynamo.reset()
    model = tiny.model()
    if fp8:
        model.set_fp8("current")
    step = torch.compile(model, dynamic=False, fullgraph=True, backend=counting)
    evaluate = torch.compile(score, dynamic=False, fullgraph=True, backend=counting)
    found = []
    for _ in range(3):
        for batch in batches():
            step(batch.inputs, batch.targets).backward()
            model.zero_grad()
        model.eval()
        found.append(bits_per_byte(model, batches(), sizes(), score=evaluate))
        model.train()
    assert compiled == ["training", "evaluation"]
    model.eval()
    assert found == [pytest.approx(bits_per_byte(model, batches(), sizes()), rel=1e-6)] * 3
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_evaluation_gives_what_eager_gives():
    works, why = can_compile(torch.device("cpu"))
    if not works:
        pytest.skip(f"torch.compile does not work here: {why}")
    model = tiny.model().eval()
    compiled = torch.compile(score, dynamic=False)
    eager = bits_per_byte(model, batches(), sizes())
    assert bits_per_byte(model, batches(), sizes(), score=compiled) == pytest.approx(eager, rel=1e-5)
