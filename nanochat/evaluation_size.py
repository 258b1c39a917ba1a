"""How many questions a speedrun on the Hub's data asks: a sample of every evaluation, within the time planned for it.

Half of the time is for CORE, of the base model; half for ChatCORE's tasks, of each stage's model. What a question costs
is assumed, and to the safe side; the report's intervals say what the sample is worth.
"""

from nanochat import sandbox
from nanochat.presets import Flags
from nanochat.tasks import available

SHARE = 0.12  # of the time limit of a run that has one
SHARE_OF_BASE = 0.05  # of base training where there is no limit,
SECONDS = (300.0, 1800.0)  # but at least and at most so many
LIMIT = 500  # questions of a task, at most: nanochat's for CORE
FEWEST = 11  # of CORE: ten solved ones are shown before a question

# Costs, in tokens trained in the same time; on a CPU a forward pass took 0.15 to 0.22, a token decoded 2 to 3.
FORWARD = 0.4
DECODE = dict(cpu=3.0, mps=10.0, cuda=20.0)  # of 64 answers at a time: on a GPU most of a step is launches
CORE_START = 12.0  # seconds: imports, reading the bundle
CORE_TASKS, CORE_TOKENS = 22, 700  # tokens of an example, shared ones once: the mean of 18 tasks, 4,096 of vocabulary
CHOICES, WRITTEN = 3, 3  # ChatCORE's tasks, by how they are answered
QUESTION, ANSWER = 150, 300  # tokens; a base model goes on to the end of its context
SANDBOX = 0.15  # seconds of a program of HumanEval


def seconds(max_minutes: float | None, base_seconds: float) -> float:
    """That evaluation may take, of a run with a time limit, or else of so many seconds of base training."""
    if max_minutes is not None:
        return SHARE * 60 * max_minutes
    return min(max(SHARE_OF_BASE * base_seconds, SECONDS[0]), SECONDS[1])


def flags(time: float, rate: float, device: str, context: int, stages: int = 3) -> tuple[Flags, Flags]:
    """Of base_eval for CORE ({}: there is no time for it) and of chat_eval, for so many seconds.

    rate: tokens per second that one device trains; context: of the model, in tokens; stages: whose models chat.
    """
    core = CORE_TASKS * CORE_TOKENS * FORWARD / rate
    answer = min(ANSWER, context - QUESTION // 2)
    written = QUESTION * FORWARD + answer * DECODE[device]
    chat = stages * ((CHOICES * QUESTION * FORWARD + WRITTEN * written) / rate + SANDBOX)
    rows, problems = (min(int(count), LIMIT) for count in ((time / 2 - CORE_START) / core, time / 2 / chat))
    asked: Flags = dict(tasks=",".join(tasks()), max_problems=max(1, problems))
    return dict(eval="core", max_per_task=rows) if rows >= FEWEST else {}, asked


def tasks() -> list[str]:
    """ChatCORE's that can be asked here: with their data, and HumanEval where programs can be isolated."""
    return [name for name in available() if name != "humaneval" or not sandbox.missing()]
