"""Upstream's own scorer on the same weights, in a process of its own: the same rows are right.

Slow, and only where NANOCHAT_UPSTREAM names a clone of karpathy/nanochat. Models with a context of 512: one whose
weights are all drawn at random, and one that is trained here for a few minutes.
"""

import os
from dataclasses import asdict
from pathlib import Path

import bundles
import pytest
import tiny
import torch
from safetensors.torch import save_file
from test_core import Written

from benchmarks.core_eval import WORKER, drawn
from nanochat.data import choose
from nanochat.evaluate import bundle, core, core_prompts
from nanochat.evaluate.core_batches import OurModel
from nanochat.gpt import GPT, GPTConfig
from nanochat.run import Run
from nanochat.tokenizer import Tokenizer
from nanochat.turns import measure, start

UPSTREAM = os.environ.get("NANOCHAT_UPSTREAM", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not UPSTREAM, reason="NANOCHAT_UPSTREAM names no clone of karpathy/nanochat"),
]
CLOSE = 1e-4  # an example whose margin is smaller may come out either way
ROWS = 12  # of each task
TRAINING = (
    "--depth=2 --head-dim=32 --max-seq-len=512 --device-batch-size=4 --total-batch-size=2048 --num-iterations=120 "
    "--compile=no --eval-every=-1 --eval-tokens=4096"
).split()


@pytest.fixture
def found(shared, tmp_path, monkeypatch) -> bundle.Bundle:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_HUB_ROOT", str(shared / "data" / "hub"))
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    assert tiny.call("tok_train", "--run=a", "--data=hub", "--vocab-size=4096") == 0
    return bundle.load(shared / "data" / "eval_bundle")


def test_of_a_model_with_drawn_weights(found):
    config = GPTConfig(512, 4096, n_layer=3, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SSSL")
    compare(drawn(config), found)


def test_of_a_trained_model(found):
    assert tiny.call("base_train", "--run=a", "--data=hub", *TRAINING) == 0
    model = Run.open("a").checkpoint("base").model("cpu", torch.float32)
    compare(model, found)
    right = [accuracy for _, accuracy, _ in compare(model, frequent(Run.open("a").folder / "bundle"))]
    assert 0 < right[0] < 1  # no task of the bundle has a continuation that such a model would give


def frequent(folder: Path) -> bundle.Bundle:
    """A bundle of language modelling: sentences of the training text, up to a word that is often right."""
    texts = choose.documents("hub", 0).load("val", 0)
    words = [text.split() for text in texts]
    rows = [
        dict(context=" ".join(line[at - 12 : at]), continuation=line[at])
        for line in words
        for at in range(12, len(line), 30)
        if line[at] in ("<unk>", "the", ",", "of")
    ]
    task = {"lambada_openai": ("language_modeling", 2, " ", 0)}
    return bundle.load(bundles.write(folder, {"lambada_openai": rows[:ROWS]}, task))


def compare(model: GPT, found: bundle.Bundle) -> list[tuple[str, float, float]]:
    """(task, our accuracy, upstream's) of all tasks, after it has looked at every row."""
    tokenizer = Run.open("a").tokenizer()
    weights = Run.open("a").folder / "weights.safetensors"
    save_file(model.state_dict(), weights)
    theirs = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern")
    config = {name: value for name, value in asdict(model.config).items() if name in theirs}
    settings = dict(
        weights=str(weights), config=config, bundle=str(found.folder.resolve()), max_per_task=ROWS,
        tokenizer=str(Run.open("a").stage("tokenizer")),
    )  # fmt: skip
    worker = start(str(Path(UPSTREAM).resolve()), settings, WORKER)
    asked, flips, accuracies = OurModel(model.eval(), tokenizer, 2048), [], []
    try:
        for number, task in enumerate(found.tasks):
            right = measure(worker, number)["right"]
            ours = core.answer(asked, task, max_per_task=ROWS)
            assert isinstance(ours, core.Answers) and len(right) == len(ours.right) == ROWS
            for index in [i for i in range(ROWS) if right[i] != ours.right[i]]:
                flips.append((task.label, index, margin(model, tokenizer, task, index)))
            accuracies.append((task.label, ours.accuracy, sum(right) / ROWS))
    finally:
        worker.kill()
        worker.wait()
    print("\n".join(f"{label:34} ours {a:.3f} upstream {b:.3f}" for label, a, b in accuracies), flips)
    assert all(gap < CLOSE for _, _, gap in flips), flips
    assert len(accuracies) == 1 or len({accuracy for _, accuracy, _ in accuracies}) > 3  # not all the same
    return accuracies


@torch.no_grad()
def margin(model: GPT, tokenizer: Tokenizer, task: bundle.CoreTask, index: int) -> float:
    """How close a row is: between the two lowest mean losses, or between the likeliest token and the next."""
    example = core_prompts.example(task, core.chosen(task, ROWS), index, tokenizer.encode_documents, None)
    means, gaps = [], []
    for ids, (first, last) in zip(example.ids, example.spans):
        row = torch.tensor(ids)
        logits = model.logits(model.hidden(row[:, None], Written(model, row))[:, 0])[first - 1 : last - 1]
        means.append(torch.nn.functional.cross_entropy(logits, row[first:last]).item())
        best = logits.topk(2).values
        gaps.append((best[:, 0] - best[:, 1]).min().item())
    if task.kind == "language_modeling":
        return gaps[0]
    lowest = sorted(means)
    return lowest[1] - lowest[0]
