"""Runs with a small model of random weights, for tests of ways in and out."""

from functools import cache

import tiny
import torch

from nanochat import checkpoint
from nanochat.gpt import GPT, GPTConfig
from nanochat.run import Run

VOCAB = 340
SIZES = dict(sequence_len=64, vocab_size=VOCAB, n_layer=2, n_head=4, n_kv_head=2, n_embd=64)
RATES = dict(embedding_lr=0.3, unembedding_lr=0.008, matrix_lr=0.02, scalar_lr=0.5)


tokenizer = cache(tiny.tokenizer)


def current(**sizes) -> GPTConfig:
    return GPTConfig(**{**SIZES, "window_pattern": "SL", **sizes})


def original(**sizes) -> GPTConfig:
    return GPTConfig.original(**{**SIZES, **sizes})


def run(
    name: str, config: GPTConfig, stage: str = "sft", moments: bool = False, kind: str = "random"
) -> tuple[Run, GPT]:
    """A run with a finished model of a stage, as training leaves it; with an optimizer's moments too.

    kind: "random", every parameter drawn so that none is zero; "untrained"; "trained", for a few steps.
    """
    made, words = Run.open(name), tokenizer(config.vocab_size)
    if kind == "random":
        gpt = tiny.model(**vars(config))
    else:
        torch.manual_seed(0)
        gpt = GPT(config)
        gpt.init_weights()
    words.save(made.stage("tokenizer"))
    length = config.sequence_len
    meta = dict(
        stage=stage, step=3, finished=True, tokenizer=words.fingerprint, rates=RATES, data="made up", plan={},
        settings=dict(device_batch_size=2, max_seq_len=length, total_batch_size=2 * length), dtype="torch.float32",
        state=dict(step=3, val_bpb=1.5), loader={},
    )  # fmt: skip
    parts = {}
    if moments or kind == "trained":
        optimizer = gpt.setup_optimizer(**RATES)
        for _ in range(2 if moments else 20):
            ids = torch.randint(config.vocab_size, (2, 1)) + torch.arange(17)
            ids %= config.vocab_size
            gpt(ids[:, :-1], ids[:, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad()
        parts["optimizer"] = optimizer.full_state()
    checkpoint.save(made.stage(stage), meta, gpt, parts)
    return made, gpt.eval()


def same(one: dict, other: dict) -> None:
    """Two dicts of tensors are equal to the bit."""
    assert set(one) == set(other)
    for name in one:
        assert torch.equal(one[name].float(), other[name].float()), name


def taught(name: str, config: GPTConfig, stage: str, question: str, answer: str) -> None:
    """A run whose model knows one conversation by heart."""
    made, gpt = run(name, config, stage, kind="untrained")
    found = made.checkpoint(stage)
    talk = [dict(role="user", content=question), dict(role="assistant", content=answer)]
    ids = torch.tensor([tokenizer(config.vocab_size).render(dict(messages=talk))[0]])
    optimizer = gpt.train().setup_optimizer(**RATES)
    for _ in range(40):
        loss = gpt(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1, loss
    checkpoint.save(made.stage(stage), found.meta, gpt, {})
