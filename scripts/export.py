"""A model out of its run, or training text: for Hugging Face's transformers, for nanochat, as parquet.

`--to hf` writes a folder that `AutoModelForCausalLM.from_pretrained` loads, `--to upstream` one that nanochat's own
commands work on, and `--to parquet` makes of --data the files that nanochat trains on.
"""

from dataclasses import dataclass
from pathlib import Path

from nanochat.data import choose
from nanochat.errors import UserError
from nanochat.exchange import hf_model, layout, parquet, to_upstream
from nanochat.flags import flag, number, parse, path, run_script
from nanochat.run import Run

TO = ("hf", "upstream", "parquet")
ONLY = dict(dtype="hf", data="parquet", max_chars="parquet")  # flags that go with one of these


@dataclass
class Flags:
    run: str = flag("speedrun", "name of the run: its folder under $NANOCHAT_BASE_DIR/runs", "--model-tag", "-g")
    source: str = flag("", "stage whose model to take: base | mid | sft (default: the last there is)", "-i")
    step: int = number(-1, 0, 1 << 40, "checkpoint of this step (-1: the finished model)")
    to: str = flag("hf", "what for: transformers, nanochat, or nanochat's training text", choices=TO)
    out: str = path("", "folder to write, which must not exist (default: RUN-STAGE-TO here)")
    dtype: str = flag("float32", "of the weights, --to hf only", choices=tuple(hf_model.DTYPES))
    data: str = path("embedded", "text, --to parquet only: embedded | a path to parquet, JSONL or text files")
    max_chars: int = number(250_000_000, 1, 1 << 50, "characters of training text at most, --to parquet only")


def main() -> None:
    flags = parse(Flags, __doc__ or "")
    for name, to in ONLY.items():
        if flags.to != to and getattr(flags, name) != getattr(Flags, name):
            raise UserError(f"--{name.replace('_', '-')} goes with --to {to} only; leave it out for --to {flags.to}")
    if flags.to == "parquet":
        return text(flags)
    run = Run.open(flags.run)
    found = run.checkpoint(flags.source or None, flags.step if flags.step >= 0 else None)
    tokenizer = run.tokenizer()
    found.check_tokenizer(tokenizer)
    stage = found.meta["stage"]
    out = Path(flags.out or f"{run.name}-{stage}-{flags.to}")
    if flags.to == "upstream":
        print(to_upstream.export(found, tokenizer, out))
        return
    hf_model.export(found, tokenizer, run, out, flags.dtype)
    own = "" if layout.is_original(found.config) else ", trust_remote_code=True"
    print(f"{out}: the {stage} model of run {run.name!r}, step {found.step}, {flags.dtype}; transformers loads it with")
    print(f'AutoModelForCausalLM.from_pretrained("{out}"{own})')


def text(flags: Flags) -> None:
    if flags.data == "hub":
        raise UserError("--data hub is made of such files already; give a path, or embedded")
    source = choose.documents(flags.data, flags.max_chars // 4)
    print(parquet.export(source, Path(flags.out or "text-parquet"), flags.max_chars))


if __name__ == "__main__":
    run_script(main, goes_on=True)
