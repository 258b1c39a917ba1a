"""A model from elsewhere becomes a run: python -m scripts.import_model PATH [flags].

PATH is a folder of nanochat's (model_*.pt, meta_*.json; October 2025 or today), or one of transformers'
(NanoChatForCausalLM, or what scripts.export wrote). Nothing in it is executed. Afterwards every command works on it.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from nanochat.errors import UserError
from nanochat.exchange import from_hf, from_upstream, incoming
from nanochat.exchange.to_upstream import FOLDERS
from nanochat.flags import flag, number, parse, path, run_script
from nanochat.one_writer import only_writer
from nanochat.run import Run


@dataclass
class Flags:
    run: str = flag("", "name of the run to make (default: PATH's last part)", "--model-tag", "-g")
    stage: str = flag("", "what it is here: base | mid | sft (default: as the folder says, else sft)", "-i")
    step: int = number(-1, 0, 1 << 40, "of several models of nanochat's in PATH (-1: the last)")
    tokenizer: str = path("", "nanochat's tokenizer.pkl (default: beside the model, or in its ../../tokenizer)")


def main() -> None:
    words = sys.argv[1:]
    path = words[0] if words and not words[0].startswith("-") else ""
    flags = parse(Flags, __doc__ or "", words[1:] if path else words)
    if not path:
        raise UserError("give the folder to import first: python -m scripts.import_model PATH")
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give the one that has config.json or model_*.pt in it")
    run = Run.open(flags.run or re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).lstrip("._-") or "imported")
    with only_writer(run):
        came = look(folder, flags)
        checkpoint = incoming.store(came, run)
    print(f"run {run.name!r}: {came.origin} Its {came.stage} model is in {checkpoint.folder}.")
    for what in came.lost:
        print(f"  not carried over: {what}")
    if came.optimizer:
        print("  carried over too: the optimizer's moments")
    if came.stage == "base":
        print(f"Evaluate it with python -m scripts.base_eval --run {run.name}, train it on with scripts.mid_train.")
    else:
        print(f"Talk to it with python -m scripts.chat_cli --run {run.name}.")


def look(folder: Path, flags: Flags) -> incoming.Incoming:
    """Reads and checks all of it."""
    if from_upstream.steps(folder):
        step = flags.step if flags.step >= 0 else None
        words = Path(flags.tokenizer).expanduser() if flags.tokenizer else None
        return from_upstream.read(folder, flags.stage, step, words)
    if (folder / "config.json").exists():
        if flags.step >= 0 or flags.tokenizer:
            raise UserError(f"--step and --tokenizer are for folders of nanochat's, and {folder} is of transformers")
        return from_hf.read(folder, flags.stage)
    models = [one for name in FOLDERS.values() for one in sorted((folder / name).glob("*")) if from_upstream.steps(one)]
    hint = f"; import one of {', '.join(map(str, models))}" if models else ""
    raise UserError(f"{folder} has neither config.json nor model_*.pt in it{hint}")


if __name__ == "__main__":
    run_script(main, goes_on=True)
