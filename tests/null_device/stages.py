"""Run on the computing null device, with test_training's home as argument: stages train in every precision.

Losses are those of the CPU in float32, within what the precision rounds; a run that was stopped and called again takes
the steps of one that was not.
"""

import os
import signal
import sys
import warnings
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent.parent)]

import tiny  # noqa: E402
from test_training import CHAT, SIZES  # noqa: E402

from nanochat import trainer  # noqa: E402
from nanochat.errors import EXIT_INTERRUPTED  # noqa: E402
from nanochat.log import read_log  # noqa: E402
from nanochat.run import Run  # noqa: E402
from profiling.compiled import null_device  # noqa: E402

warnings.filterwarnings("error", "training on .* without CUDA graphs")  # it would go on without them: not here
HOME = Path(sys.argv[1])
STEPS = 5


def train(
    run: str, *flags: str, script: str = "base_train", data: str = "text", dtype: str = "", code: int = 0
) -> None:
    os.environ.pop("NANOCHAT_DTYPE", None)
    if dtype:
        os.environ["NANOCHAT_DTYPE"] = dtype
    if run not in ("a", "b"):
        tiny.tokenizer().save(Run.open(run).stage("tokenizer"))
    data, sizes = ("text", SIZES) if script == "base_train" else ("chat", CHAT)
    words = [f"--run={run}", f"--data={HOME / data}.jsonl", *sizes, f"--num-iterations={STEPS}", *flags]
    assert tiny.call(script, *words) == code, words


def of(run: str) -> torch.Tensor:
    """The losses of all steps and the last validation: those in between are as large as the time allows."""
    rows = read_log(Run.open(run).stage("base") / "log.jsonl")
    validations = [row["val_bpb"] for row in rows if "val_bpb" in row]
    return torch.tensor([row["loss"] for row in rows if "loss" in row] + validations[-1:], dtype=torch.float64)


train("reference", "--device-type=cpu", dtype="float32")
wanted = of("reference")
assert len(wanted) == STEPS + 1

for run, card, dtype, flags, allowed in [
    ("float32", "h100", "float32", [], 1e-4),
    ("bfloat16", "h100", "", [], 2e-2),
    ("compiled", "h100", "", ["--compile=auto"], 2e-2),
    ("float16", "4090", "float16", [], 2e-2),
    ("current", "h100", "", ["--fp8"], 2e-2),
    ("delayed", "4090", "", ["--fp8", "--fp8-scaling=delayed"], 2e-2),
    ("emulated", "3090", "", ["--fp8"], 2e-2),
]:
    null_device.become(card)
    train(run, *flags, dtype=dtype)
    apart = (of(run) - wanted).abs().max().item()
    assert len(of(run)) == len(wanted) and apart <= allowed, (run, apart, of(run), wanted)
    print(f"{run}: losses at most {apart:.2g} apart", flush=True)

# Stopped in the middle, and called again.
null_device.become("h100")
plain = trainer._account


def interrupting(stage, *args):
    plain(stage, *args)
    if stage.state.step == STEPS - 1:
        os.kill(os.getpid(), signal.SIGINT)


trainer._account = interrupting
train("again", code=EXIT_INTERRUPTED)
trainer._account = plain
train("again")
assert torch.equal(of("again"), of("bfloat16")), (of("again"), of("bfloat16"))
for script in ("mid_train", "chat_sft"):
    train("again", script=script)
print("stages: as wanted")
