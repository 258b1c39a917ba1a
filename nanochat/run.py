"""A run: everything that belongs together, in one folder.

$NANOCHAT_BASE_DIR/runs/NAME/
    plan.json                     what speedrun.sh decided, so that a second call goes on with the same numbers
    tokenizer/tokenizer.json      and summary.json
    base/  mid/  sft/             step_…/ (checkpoints), log.jsonl, and summary.json when finished
    eval/                         results
    report.md
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat import checkpoint
from nanochat.checkpoint import Checkpoint
from nanochat.errors import UserError
from nanochat.files import base_dir, write_atomically
from nanochat.tokenizer import Tokenizer

TRAINED = ("base", "mid", "sft")  # stages that leave a model, in order


@dataclass(frozen=True)
class Run:
    """Paths of a run and what is in them."""

    name: str
    folder: Path

    @classmethod
    def open(cls, name: str) -> "Run":
        """The run of this name, which need not exist yet. Raises UserError for a name that is no folder name."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise UserError(
                f"--run is {name!r}, wanted letters, digits, '.', '_' and '-', beginning with one of the first two"
            )
        return cls(name, base_dir() / "runs" / name)

    def stage(self, stage: str) -> Path:
        return self.folder / stage

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.stage("tokenizer"))

    def checkpoint(self, stage: str | None = None, step: int | None = None) -> Checkpoint:
        """The finished model of a stage, or of the last stage there is; or a stage's checkpoint of a given step.

        Raises UserError when there is none.
        """
        if step is not None:
            return self._at_step(stage, step)
        for name in [stage] if stage else reversed(TRAINED):
            if name not in TRAINED:
                raise UserError(f"there is no stage {name!r}; a model comes from {', '.join(TRAINED)}")
            if checkpoint.finished(self.stage(name)):
                found = checkpoint.latest(self.stage(name))
                if found is not None and found.finished:
                    return found
        trained = [name for name in TRAINED if checkpoint.finished(self.stage(name))]
        there = f"finished there: {', '.join(trained)}" if trained else "nothing is finished there yet"
        raise UserError(
            f"run {self.name!r} has no finished {stage or 'model'} in {self.folder} ({there}); train it first"
        )

    def _at_step(self, stage: str | None, step: int) -> Checkpoint:
        name = stage or next((name for name in reversed(TRAINED) if self.stage(name).is_dir()), TRAINED[0])
        steps = sorted(int(path.name[5:]) for path in self.stage(name).glob("step_*"))
        if step not in steps:
            kept = ", ".join(map(str, steps)) or "none"
            raise UserError(f"run {self.name!r} has no checkpoint of {name} at step {step}; kept are {kept}")
        return checkpoint.at(self.stage(name) / f"step_{step:06d}")

    def write_summary(self, stage: str, summary: dict[str, Any]) -> None:
        write_atomically(self.stage(stage) / "summary.json", json.dumps(summary, indent=1).encode())

    def summary(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage wrote about itself, or None."""
        try:
            return json.loads((self.stage(stage) / "summary.json").read_text())
        except (FileNotFoundError, ValueError):
            return None
