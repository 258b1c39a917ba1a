"""Chapter 9: a training step, and how much of the card it uses."""

from nanochat.cards import PEAKS
from nanochat.cost import flops_per_token, parameter_counts
from nanochat.course.chapter import Chapter, near, number, results, table
from nanochat.recipe import model_config


def measured() -> dict:
    return results("h100-second-run.json")


def picture() -> str:
    """The same step launched kernel by kernel, and replayed as two CUDA graphs."""
    rows = []
    for name, key in (("bfloat16", "training_step"), ("fp8", "fp8_step")):
        for how in ("launched", "replayed"):
            found = measured()[key][how]
            rows.append(
                [f"{name}, {how}", f"{found['step_ms']:.1f}", f"{found['kernels_ms']:.1f}", f"{found['launches']:,.0f}",
                 f"{found['tok_per_s']:,}"]
            )  # fmt: skip
    return table(["step of depth 12", "ms", "ms of kernels", "kernels", "tokens/s"], rows)


def right() -> float:
    """Percent."""
    step, made = measured()["training_step"], measured()
    config = model_config(step["depth"], step["vocab_size"], step["sequence_len"])
    peak = PEAKS[made["environment"]["machine"]].bf16 * 1e12
    return 100 * flops_per_token(config) * step["replayed"]["tok_per_s"] / peak


def check(answer: str) -> str:
    value, wanted = number(answer), right()
    if near(value, wanted):
        return ""
    if near(value, wanted / 100):
        return "Right, as a fraction; the question is for percent."
    config = model_config(12, 32768)
    if near(value, wanted * 6 * parameter_counts(config)["total"] / flops_per_token(config)):
        return "An embedding is looked up, not multiplied: its parameters cost no FLOPs. And attention costs some."
    launched = measured()["training_step"]["launched"]["tok_per_s"]
    if near(value, wanted * launched / measured()["training_step"]["replayed"]["tok_per_s"]):
        return "That is the launched step's."
    return "FLOPs per token (`flops_per_token`) times tokens per second, over the card's peak (nanochat/cards.py)."


CHAPTER = Chapter(
    "A training step",
    "What is the MFU of the replayed bfloat16 step in the table, in percent? Depth 12, vocabulary 32768, "
    "sequences of 2048, "
    'on one "NVIDIA H100 80GB HBM3".',
    picture,
    check,
)
