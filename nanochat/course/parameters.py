"""Chapter 3: the architecture, and where its parameters are."""

from nanochat.cost import parameter_counts
from nanochat.course.chapter import Chapter, number, table
from nanochat.gpt import VE_GATE_CHANNELS
from nanochat.recipe import model_config

DEPTH = 8


def picture() -> str:
    counts = {depth: parameter_counts(model_config(depth, 32768)) for depth in (4, 12, 24)}
    rows = [[part, *(f"{counts[depth][part]:,}" for depth in counts)] for part in counts[4]]
    return table(["parameters", *(f"depth {depth}" for depth in counts)], rows)


def check(answer: str) -> str:
    value, config = number(answer), model_config(DEPTH, 32768)
    counts = parameter_counts(config)
    if value == counts["transformer_matrices"]:
        return ""
    C = config.n_embd
    if value == DEPTH * 12 * C * C:
        return "Those are the six large matrices of every layer. Which small one have some layers besides?"
    gate = VE_GATE_CHANNELS * config.n_kv_head
    if value == DEPTH * (12 * C * C + gate):
        return "Not every layer has that gate: see `GPTConfig.has_value_embed`."
    if value in (12 * C * C, DEPTH * 4 * C * C, DEPTH * 8 * C * C):
        return "All layers, and in each both parts: four matrices of attention, two of the MLP."
    if value == counts["total"]:
        return "Without the tables and the head: only what is called transformer.h."
    return f"Depth {DEPTH} is {C} wide. Write down the shape of each matrix in `Attention` and in `MLP`, and add up."


CHAPTER = Chapter(
    "The model, from above",
    f"How many parameters do the matrices of all blocks have (`transformer.h`) at depth {DEPTH}, with the "
    "width, heads and "
    "tricks that the recipe gives it? An expression will do.",
    picture,
    check,
)
