"""Chapter 10: a token at a time."""

from nanochat.cards import PEAKS
from nanochat.cost import decode_cost, linear_params
from nanochat.course.chapter import Chapter, near, number, results, table
from nanochat.recipe import model_config

KEYS, CARD = 1000, "NVIDIA H100 80GB HBM3"


def picture() -> str:
    rows = []
    for row in results("h100-second-run.json")["decode"]["rows"]:
        rows.append(
            [f"{row['engine']}, {row['batch']} at once", f"{row['tok_per_s']:,.0f}", f"{row['token_ms']:.2f}",
             f"{row['bandwidth_use']:.1%}"]
        )  # fmt: skip
    return table(["depth 12, one H100", "tokens/s", "ms a step", "of the bandwidth"], rows)


def check(answer: str) -> str:
    value, config = number(answer), model_config(12, 32768)
    bandwidth = PEAKS[CARD].bandwidth * 1e12
    if near(value, bandwidth / decode_cost(config, [KEYS], 2)[1]):
        return ""
    weights, each = 2 * linear_params(config), 2 * 2 * config.n_kv_head * config.head_dim  # bytes; of a key and value
    if near(value, bandwidth / weights):
        return "That is the weights alone. Keys and values are read too."
    if near(value, bandwidth / (weights + config.n_layer * KEYS * each)):
        return "A layer with a window does not read the keys before it."
    if near(value, bandwidth / decode_cost(config, [KEYS], 4)[1]):
        return "That is in float32; bfloat16 has 2 bytes a number."
    return "Bytes a token: 2 per weight that is multiplied, and in each layer 2·2·K·D for every key in sight."


CHAPTER = Chapter(
    "A token at a time",
    f"At depth 12 in bfloat16, one sequence that sees {KEYS} keys where no window hides some (its own among "
    "them): how many "
    f'tokens per second are the most, if an "{CARD}" read what it must at the full bandwidth of its data sheet?',
    picture,
    check,
)
