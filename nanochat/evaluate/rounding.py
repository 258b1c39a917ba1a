"""What int8 weights (nanochat/engine/weights.py) cost: bits per byte and the tasks' scores, beside the compute dtype's.

All goes through the products that several rows have: the larger error, as activations are rounded too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.data import choose
from nanochat.data.loader import Rows, document_encoder, one_pass
from nanochat.engine import Engine, Sampling
from nanochat.evaluate import results
from nanochat.evaluate.askers import How, of_model
from nanochat.evaluate.bits_per_byte import bits_per_byte
from nanochat.evaluate.chat_tasks import chosen, evaluate
from nanochat.gpt import GPT
from nanochat.hardware import Hardware
from nanochat.run import Run
from nanochat.tasks import TASKS

WORSE = 0.005  # of a score: more is said aloud
ROWS, TOKENS, QUESTIONS, ANSWERS = 4, 65536, 200, 32  # of text at a time, and in all; of each task, and at a time


def score(model: GPT, inputs: Tensor, targets: Tensor, token_bytes: Tensor) -> tuple[Tensor, Tensor]:
    """As bits_per_byte.score, of the logits: training's loss multiplies with the head's weight as it is."""
    logits = model.logits(model.hidden(inputs)).flatten(0, 1)  # (B·T, V)
    losses = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="none").view_as(targets)
    size = torch.where(targets >= 0, token_bytes[targets.clamp_min(0)], 0)
    return (losses * (size > 0)).sum(), size.sum()


def compare(run: Run, hardware: Hardware) -> dict:
    """Scores of a run's newest model, [compute dtype's, int8's] each, printed and kept for the report."""
    found = run.checkpoint(None, older=True)
    tokenizer, stage, data = run.tokenizer(), found.meta["stage"], found.meta.get("data", "")
    found.check_tokenizer(tokenizer)
    source = choose.documents("embedded", TOKENS)
    texts: list[float] = []
    tasks: dict[str, list[float]] = {name: [] for name in chosen("", data)[0]}
    for weights in ("", "int8"):
        engine = Engine(found.model(hardware.device, hardware.dtype, hardware.dtype), ANSWERS, weights)
        rows = Rows(ROWS, engine.config.sequence_len, rank=0, world=1)
        count = max(1, TOKENS // engine.config.sequence_len)
        batches = one_pass(source, "val", document_encoder(tokenizer), rows, count, tokenizer.bos)
        texts.append(bits_per_byte(engine.model, batches, tokenizer.token_bytes(), score=score))
        ask, _ = of_model(engine.model, tokenizer, ANSWERS, How(Sampling(temperature=0.0)))
        for name, rates in tasks.items():
            rates.append(evaluate(TASKS[name], QUESTIONS, ask, hardware).rate)
    result = dict(stage=stage, model=found.fingerprint, dtype=str(hardware.dtype)[6:], bpb=texts, tasks=tasks)
    for title, before, after in lines(result):
        print(f"{title:24} {before:.4f}, int8 {after:.4f}", flush=True)
    print(verdict(result), flush=True)
    results.keep_entry(run, stage, result, "int8")
    return result


def lines(result: dict) -> list[tuple[str, float, float]]:
    """(what, compute dtype's, int8's)."""
    return [("bits per byte", *result["bpb"]), *((name, *rates) for name, rates in result["tasks"].items())]


def verdict(result: dict) -> str:
    """Whether int8 is worse: in bits per byte, and in the mean of the tasks' rates."""
    text = result["bpb"][1] / result["bpb"][0] - 1
    before, after = (sum(rates[i] for rates in result["tasks"].values()) for i in (0, 1))
    said = {"bits per byte": text, "the mean of the tasks": 1 - after / before if before else 0.0}
    bad = [f"{name} by {share:.1%}" for name, share in said.items() if share > WORSE]
    if bad:
        return f"int8 weights make it more than {WORSE:.1%} worse: {', '.join(bad)}."
    return f"int8 weights cost no more than {WORSE:.1%}."
