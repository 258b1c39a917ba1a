"""Chapter 8: everything follows from the depth."""

from nanochat.cost import scaling_params
from nanochat.course.chapter import Chapter, number, table
from nanochat.recipe import horizon, model_config

VOCAB, DECAY, WANTED = 32768, 0.28, 2**20


def picture() -> str:
    rows = []
    for depth in (2, 4, 12, 24, 32):
        config = model_config(depth, VOCAB)
        plan = horizon(config, DECAY)
        rows.append(
            [str(depth), f"{config.n_embd:,}", f"{scaling_params(config):,}", f"{plan.total_batch_size:,}",
             f"{plan.num_iterations:,}", f"{plan.lr_scale:.2f}", f"{plan.weight_decay:.3f}"]
        )  # fmt: skip
    return table(["depth", "width", "scaling parameters", "batch, tokens", "steps", "lr ×", "weight decay"], rows)


def batch(depth: int) -> int:
    return horizon(model_config(depth, VOCAB), DECAY).total_batch_size


def check(answer: str) -> str:
    value = number(answer)
    if value != int(value) or not 1 <= value <= 100:
        return "The answer is a depth: a whole number of layers."
    right = next(depth for depth in range(1, 100) if batch(depth) == WANTED)
    if value == right:
        return ""
    if batch(int(value)) == WANTED:
        return f"At depth {value:g} the batch is that large, but a smaller depth has it too."
    return (
        f"At depth {value:g} the batch is {batch(int(value)):,} tokens. See how it is rounded: where is log2 half-way?"
    )


CHAPTER = Chapter(
    "One dial",
    f"Vocabulary {VOCAB}, 12 tokens a parameter, sequences of 2048. Which is the smallest depth whose batch "
    f"is {WANTED} "
    "tokens?",
    picture,
    check,
)
