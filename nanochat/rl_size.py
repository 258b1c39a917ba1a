"""What the stage `rl` of a speedrun is: its flags, and how long it is predicted to take.

On the Hub's data it practises GSM8K, each question once, as nanochat did; on the embedded data word problems, of which
SFT then sees a few. It is off by default on CPUs and Apple GPUs, and on wherever else GSM8K can be had.
"""

from nanochat.errors import UserError
from nanochat.evaluate.chat_tasks import MICROWORLD
from nanochat.evaluation_size import DECODE
from nanochat.presets import Flags
from nanochat.tasks import available

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
    return asked or (device == "cuda" and data == "hub" and "gsm8k" in available())


def flags(data: str, ranks: int) -> Flags:
    if data == "hub":
        questions = max(16, ranks)
        return dict(task="gsm8k", questions=questions, num_iterations=GSM8K // questions)
    return dict(
        task="word_sums", questions=max(8, ranks), num_samples=8, num_iterations=60, init_lr_frac=0.1, eval_every=20
    )


def seconds(data: str, planned: Flags, rate: float, device: str) -> float:
    """Of so many steps, where training runs at `rate` tokens per second: predicted."""
    prompt, answer = TOKENS[data]
    answers = int(planned["questions"]) * int(planned.get("num_samples", 16)) * int(planned["num_iterations"])
    return answers * (answer * DECODE[device] + (prompt + answer) * LEARNING) / rate


def evaluated() -> str:
    """Tasks that the small world's models are asked where there is this stage."""
    return ",".join([*MICROWORLD, "word_sums"])
