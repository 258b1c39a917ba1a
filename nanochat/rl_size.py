"""What the stage `rl` of a speedrun is: its flags, and how long it is predicted to take.

On the Hub's data it practises GSM8K, each question once, as nanochat did; on the embedded data word problems, of which
SFT then sees a few. It is off by default on CPUs and Apple GPUs, and on wherever else GSM8K can be had.
"""

from nanochat.data import hub
from nanochat.errors import UserError
from nanochat.evaluate.chat_tasks import MICROWORLD
from nanochat.evaluation_size import DECODE
from nanochat.presets import Flags
from nanochat.tasks import available, gsm8k

GSM8K = 7_473  # questions
WORD_PROBLEMS = 1  # percent of SFT's exchanges: about as many as in experiments/rl.md, where SFT is shorter
# Tokens of a prompt and of an answer, assumed; on a CPU as the word problems' are.
TOKENS = dict(embedded=(40, 25), hub=(120, 200))
LEARNING = 1.5  # times as long as in training, eagerly; of samples that teach something, at most all


def wanted(asked: bool, data: str, device: str) -> bool:
    """Whether the plan has the stage. asked: by --stages. Raises UserError where there is nothing to practise."""
    if asked and data not in TOKENS:
        raise UserError(
            f"--stages names rl, and of --data {data} there is nothing to practise: embedded and hub have it"
        )
    return asked or (device == "cuda" and data == "hub" and "gsm8k" in available() and hub.has(*gsm8k.TRAIN))


def flags(data: str, ranks: int) -> Flags:
    if data == "hub":
        questions = max(16, ranks)
        size: Flags = dict(questions=questions, num_samples=16, num_iterations=GSM8K // questions)
        return dict(task="gsm8k", **size, eval_questions=128, eval_samples=8, eval_every=60)
    size = dict(questions=max(8, ranks), num_samples=8, num_iterations=60, init_lr_frac=0.25)
    return dict(task="word_sums", **size, eval_questions=128, eval_samples=4, eval_every=20)


def seconds(data: str, planned: Flags, rate: float, device: str) -> tuple[float, float]:
    """(of so many steps, of asking held-out questions: at first, between, and at last), where training runs at `rate`
    tokens per second: predicted.
    """
    prompt, answer = TOKENS[data]
    names = ("questions", "num_samples", "num_iterations", "eval_questions", "eval_samples", "eval_every")
    questions, samples, steps, held_out, drawn, every = (int(planned[name]) for name in names)
    practice = steps * questions * samples * (answer * DECODE[device] + (prompt + answer) * LEARNING)
    examined = (1 + -(-steps // every)) * held_out * (drawn + 1) * answer * DECODE[device]  # one more: greedily
    return practice / rate, examined / rate


def evaluated() -> str:
    """Tasks that the small world's models are asked where there is this stage."""
    return ",".join([*MICROWORLD, "word_sums"])
