"""Chapter 10: a token at a time."""

import math

from nanochat.cards import PEAKS
from nanochat.cost import decode_cost, linear_params, parameter_counts
from nanochat.course.chapter import Chapter, near, number, results, table
from nanochat.gpt import GPTConfig
from nanochat.recipe import model_config

KEYS, CARD = 1000, "NVIDIA H100 80GB HBM3"


def turns(row: dict) -> tuple[float, float]:
    """Tokens per second of the slower and of the faster of a row's two turns.

    The file has the means of both turns' rates r and of their times batch/r, so the turns are the roots of a quadratic.
    """
    middle = row["tok_per_s"]
    product = row["batch"] * 1e3 * middle / row["token_ms"]
    apart = math.sqrt(max(middle**2 - product, 0.0))
    return middle - apart, middle + apart


def picture() -> str:
    """What an H100 measured; time and bandwidth of the faster turn."""
    measured, rows = results("h100-second-run.json")["decode"], []
    assert measured["flags"]["repeats"] == 2
    for row in measured["rows"]:
        slower, faster = turns(row)
        ms = 1e3 * row["batch"] / faster
        share = row["bandwidth_use"] * row["token_ms"] / ms
        rows.append(
            [
                f"{row['engine']}, {row['batch']} at once",
                f"{slower:,.0f}",
                f"{faster:,.0f}",
                f"{ms:.2f}",
                f"{share:.1%}",
            ]
        )
    return table(["depth 12, one H100", "tokens/s, slower turn", "faster turn", "ms a step", "of the bandwidth"], rows)


def keys_seen(config: GPTConfig) -> int:
    """Keys that the token sees, in all layers."""
    windows = [config.window(layer) for layer in range(config.n_layer)]
    return sum(KEYS if window is None else min(window + 1, KEYS) for window in windows)


def check(answer: str) -> str:
    value, config = number(answer), model_config(12, 32768)
    bandwidth = PEAKS[CARD].bandwidth * 1e12
    if near(value, bandwidth / decode_cost(config, [KEYS], 2)[1]):
        return ""
    weights, each = 2 * linear_params(config), 2 * 2 * config.n_kv_head * config.head_dim  # bytes; of a key and value
    seen = keys_seen(config)
    if near(value, bandwidth / weights):
        return "That is the weights alone. Keys and values are read too."
    if near(value, bandwidth / (weights + config.n_layer * KEYS * each)):
        return "A layer with a window does not read the keys before it."
    if near(value, bandwidth / decode_cost(config, [KEYS], 4)[1]):
        return "That is in float32; bfloat16 has 2 bytes a number."
    counts = parameter_counts(config)
    if near(value, bandwidth / (weights + 2 * (counts["wte"] + counts["value_embeds"]))) or near(
        value, bandwidth / (2 * counts["total"] + seen * each)
    ):
        return "That reads the embedding tables too. A token looks up one row of them; only Linears are read whole."
    if near(value, bandwidth / (weights + seen * each / 2)):
        return "That is the keys alone, or the values alone. Both are read."
    if near(value, bandwidth / (2 * counts["transformer_matrices"] + seen * each)):
        return "The head is a matrix too: every token is multiplied by it."
    return "Bytes a token: 2 per weight that is multiplied, and in each layer 2·2·K·D for every key in sight."


CHAPTER = Chapter(
    "A token at a time",
    f"Depth 12 in bfloat16, a single sequence, and its next token is the {KEYS}th: where no window hides some, it sees "
    f"{KEYS} keys, its own among them. How many tokens per second are the most at this length, if an "
    f'"{CARD}" read what it must at the full bandwidth of its data sheet?',
    picture,
    check,
)
