"""Chapter 5: what is minimised, and the unit in which it is reported."""

import math

import torch

from nanochat.course.chapter import Chapter, near, number, results, table
from nanochat.evaluate.bits_per_byte import score

NATS, BYTES = (1.2, 0.7, 2.1, 0.4), (3, 1, 0, 4)  # the third is <|bos|>


def picture() -> str:
    """The first losses of a run on an H100."""
    losses = results("h100-second-run.json")["training_step"]["launched"]["losses"]
    rows = [[str(i), f"{x:.3f}", f"{x / math.log(2):.2f}", f"{math.exp(x):,.0f}"] for i, x in enumerate(losses)]
    return table(["step", "nats per token", "bits per token", "perplexity"], rows)


def right() -> float:
    stub = lambda inputs, targets, loss_reduction: torch.tensor([NATS])
    targets = torch.tensor([[0, 1, 2, 3]])
    nats, size = score(stub, targets, targets, torch.tensor(BYTES))  # type: ignore[arg-type]
    return nats.item() / (math.log(2) * size.item())


def check(answer: str) -> str:
    value, wanted = number(answer), right()
    if near(value, wanted):
        return ""
    if near(value, wanted * math.log(2)):
        return "That is nats per byte. How many bits is a nat?"
    if near(value, sum(NATS) / sum(BYTES) / math.log(2)):
        return "<|bos|> stands for no text: neither its loss nor its bytes count."
    if near(value, wanted * sum(BYTES) / 3) or near(value, sum(NATS) / 4 / math.log(2)):
        return "That is bits per token. Divide by bytes, not by tokens."
    return "Add the losses of the tokens that count, divide by their bytes together, and turn nats into bits."


CHAPTER = Chapter(
    "The loss, and bits per byte",
    f"A model's losses for four tokens are {', '.join(map(str, NATS))} nats; the tokens stand for 3 bytes, 1 "
    "byte, nothing "
    "(it is <|bos|>) and 4 bytes. How many bits per byte is that? Three digits will do.",
    picture,
    check,
)
