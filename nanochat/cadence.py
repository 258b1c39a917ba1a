"""How often a stage validates and saves, and on how much text: so that both take less than 3% of its training time.

The last validation of a stage has a fixed size (--eval-tokens), so that its bits per byte compare between runs. Those
before it show where a run is going and may be smaller (--eval-tokens-between): they are halved until the share is kept,
to a sixteenth; then they become rarer. What each costs is predicted by `overhead`.
"""

from nanochat.cost import parameter_counts
from nanochat.errors import UserError
from nanochat.gpt import GPTConfig
from nanochat.presets import Flags

SHARE = 0.03  # of the training time
LAST = 0.01  # of it, at most, for the tokens of the last validation of a whole run
SMALLEST = 16  # an intermediate validation has at least this fraction of the last one's tokens
EVERY = dict(base=250, mid=200, sft=200)  # steps between validations, where a preset says nothing
TOKENS = dict(base=80 * 524288, mid=40 * 524288, sft=40 * 524288)  # of the last validation, likewise

# Assumed, and to the safe side:
FORWARD = 3.0  # tokens are validated this many times as fast as trained: a step has a backward of twice the forward
EAGER = 1.5  # times as long, on a CPU, where validation is eager (with the small preset on an AMD EPYC 1.4 times)
COMPILING = 60.0  # seconds, on a GPU; there eager validation takes twice as long
MFU, PEAK = 0.4, 100e12  # of a GPU; its FLOP/s where they are not known
COPY = 5e9  # bytes/s into the memory that a checkpoint is written from: training waits for it
DISK = 0.5e9  # bytes/s of hashing and writing: a thread's work, but on a CPU training shares the cores with it
UNKNOWN = 4  # a stage of unknown length counts as so many times the steps between validations, or checkpoints


def between(last: int, asked: int, device: str) -> int:
    """Tokens of an intermediate validation. asked: --eval-tokens-between; last: --eval-tokens; device: its type.

    Unless asked for (−1), a sixteenth of the last one's on a GPU, and as many elsewhere. Raises UserError.
    """
    if asked == -1:
        return last // SMALLEST if device == "cuda" else last
    if asked < 1:
        raise UserError(f"--eval-tokens-between is {asked}, wanted at least 1, or -1 for the default")
    return min(asked, last)


def compiling_pays(tokens: int, flops: int, peak: float | None) -> bool:
    """Whether all validations of a stage together are worth compiling for, on a GPU.

    tokens: of one rank; flops: of training, per token; peak: FLOP/s. With the small preset on a CPU it does not pay:
    half of some seconds would be saved, and compiling takes longer.
    """
    return tokens / FORWARD * flops / (MFU * (peak or PEAK)) > COMPILING


def validated(steps: int, every: int, between: int, last: int) -> int:
    """Tokens of all validations of a stage."""
    return ((steps - 1) // every if every > 0 else 0) * between + last


def checkpoint_bytes(config: GPTConfig) -> int:
    """Of a checkpoint: float32 matrices and bfloat16 embeddings, Muon's one moment, AdamW's two."""
    counts = parameter_counts(config)
    matrices = counts["transformer_matrices"] + counts["lm_head"]
    weights = 4 * matrices + 2 * (counts["total"] - matrices)
    return weights + 4 * counts["transformer_matrices"] + 8 * counts["lm_head"] + 4 * (counts["total"] - matrices)


def last_tokens(stage: str, flags: Flags, steps: int | None, batch: int) -> int:
    """--eval-tokens of a stage whose preset has `flags`; steps and batch: of the whole run, as the preset has it.

    It does not depend on the machine's speed nor on a time limit: runs of one preset compare.
    """
    tokens = int(flags.get("eval_tokens", TOKENS[stage]))
    while steps and tokens / FORWARD > LAST * steps * batch and "eval_tokens" not in flags:
        tokens //= 2
    return tokens


def cadence(stage: str, flags: Flags, steps: int | None, batch: int, rate: float, size: int, device: str) -> Flags:
    """eval_every, eval_tokens_between and save_every of a stage whose preset has `flags`, `eval_tokens` among them.

    The other arguments: as `overhead`.
    """
    every, tokens = int(flags.get("eval_every", EVERY[stage])), int(flags["eval_tokens"])
    save = int(flags.get("save_every", -1))
    save = save if save > 0 else every

    def made(eval_every: int, part: int) -> Flags:
        return dict(eval_every=eval_every, eval_tokens_between=max(1, tokens // part), save_every=save)

    def share(found: Flags, last: int = tokens) -> float:
        return overhead(dict(found, eval_tokens=last), length, batch, rate, size, device)

    length = steps or UNKNOWN * max(every, save)
    while 0 < save < length and share(made(-1, 1), last=0) > SHARE / 3:
        save *= 2
    while 0 < every < length:
        for part in (1, 2, 4, 8, SMALLEST):
            if share(found := made(every, part)) <= SHARE:
                return found
        every *= 2
    return made(-1, 1)


def overhead(flags: Flags, steps: int | None, batch: int, rate: float, size: int, device: str) -> float:
    """Predicted share of a stage's training time that its validations and checkpoints take.

    steps: None where nobody knows yet; batch: tokens of a step; rate: tokens trained per second; size: bytes of a
    checkpoint; device: its type.
    """
    every, save = int(flags["eval_every"]), int(flags["save_every"])
    steps = steps or UNKNOWN * max(every, save)
    tokens = validated(steps, every, int(flags["eval_tokens_between"]), int(flags["eval_tokens"])) / FORWARD
    gpu, seconds = device == "cuda", tokens / rate
    seconds = seconds + min(seconds, COMPILING) if gpu else EAGER * seconds  # on a GPU eager or compiled: the faster
    saves = sum(1 for n in range(1, steps) if (every > 0 and n % every == 0) or (save > 0 and n % save == 0))
    saves += 2  # at the end: before and after validating
    apart = min((n for n in (every, save) if n > 0), default=steps) * batch / rate
    waiting = max(0.0, size / DISK - apart)  # until the checkpoint before is written
    seconds += saves * (size / COPY + (0 if gpu else size / DISK) + waiting)
    return seconds / (steps * batch / rate)
