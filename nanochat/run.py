"""A run: everything that belongs together, in one folder.

$NANOCHAT_BASE_DIR/runs/NAME/
    plan.json                     what speedrun.sh decided, so that a second call goes on with the same numbers
    tokenizer/tokenizer.json      and summary.json
    base/  mid/  sft/  rl/        step_…/ (checkpoints), log.jsonl, and summary.json when finished
    eval/                         results
    report.md
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat import checkpoint, records
from nanochat.checkpoint import Checkpoint
from nanochat.complete import TRAINED
from nanochat.errors import UserError
from nanochat.files import base_dir, file_name
from nanochat.tokenizer import Tokenizer

SCRIPTS = dict(
    tokenizer="tok_train", base="base_train", mid="mid_train", sft="chat_sft", rl="chat_rl"
)  # that make a stage


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

    @classmethod
    def served(cls, model: str) -> "Run":
        """Where the results of a model behind a server are kept, as of a stage "server": apart from the runs."""
        return cls(model, base_dir() / "servers" / file_name(model))

    def stage(self, stage: str) -> Path:
        return self.folder / stage

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.stage("tokenizer"))

    def checkpoint(self, stage: str | None = None, step: int | None = None, older: bool = False) -> Checkpoint:
        """The finished model of a stage, or of the last stage that has one; or a stage's checkpoint of a given step.

        older: of a stage that was finished and whose last checkpoint is damaged, take the newest complete one. Whatever
        is passed over is said on stderr. Raises UserError when there is none.
        """
        if step is not None:
            return self._at_step(stage, step)
        if stage is not None:
            self._check_stage(stage)
        passed_over: list[str] = []
        for name in [stage] if stage else reversed(TRAINED):
            found, damaged = checkpoint.newest(self.stage(name))
            was_finished = self._summary(name).exists()
            if was_finished and not damaged and not (found and found.finished):
                damaged = [f"{self.stage(name)} was finished, and its last checkpoint is gone"]
            passed_over += damaged
            if found and (found.finished or (older and damaged and was_finished)):
                if passed_over:
                    checkpoint.warn([*passed_over, f"the {name} model of step {found.step} is used instead"])
                return found
            if stage and damaged:
                raise UserError(self._unusable(name, found, damaged[0]))
        checkpoint.warn(passed_over)
        trained = [name for name in TRAINED if checkpoint.finished(self.stage(name))]
        there = f"finished there: {', '.join(trained)}" if trained else "nothing is finished there yet"
        raise UserError(
            f"run {self.name!r} has no finished {stage or 'model'} in {self.folder} ({there}); train it first"
        )

    def _unusable(self, stage: str, found: Checkpoint | None, damage: str) -> str:
        """Why a stage has no finished model although it has checkpoints. found: the newest complete one."""
        todo = "put a copy in its place, or train the stage again with --fresh"
        if found:
            todo = f"python -m scripts.{SCRIPTS[stage]}, called as before, goes on from step {found.step}"
        return f"run {self.name!r} has no finished {stage} that can be used: {damage}; {todo}"

    def _check_stage(self, name: str) -> None:
        if name not in TRAINED:
            raise UserError(f"there is no stage {name!r}; a model comes from {', '.join(TRAINED)}")

    def _at_step(self, stage: str | None, step: int) -> Checkpoint:
        name = stage or next((name for name in reversed(TRAINED) if self.stage(name).is_dir()), TRAINED[0])
        self._check_stage(name)
        kept = checkpoint.steps(self.stage(name))
        if step not in kept:
            said = ", ".join(map(str, kept)) or "none"
            raise UserError(f"run {self.name!r} has no checkpoint of {name} at step {step}; kept are {said}")
        return checkpoint.at(kept[step])

    def write_summary(self, stage: str, summary: dict[str, Any]) -> None:
        records.write(self._summary(stage), dict(summary, stage=stage))

    def summary(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage wrote about itself, or None. Raises UserError for one that is damaged."""
        path = self._summary(stage)
        again = f"delete it, and python -m scripts.{SCRIPTS.get(stage)}, called as before, makes it again"
        remedy = again if stage in SCRIPTS else "put a copy in its place, or delete it and evaluate all models again"
        found = records.read(path, remedy)
        if found is not None and (why := records.lacks(stage, found)):
            raise UserError(f"{path} is damaged: {why}; {remedy}")
        return found

    def _summary(self, stage: str) -> Path:
        return self.stage(stage) / "summary.json"
