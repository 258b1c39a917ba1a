"""Bits per byte of a trained model on the training and the validation text of its run."""

from dataclasses import dataclass

from nanochat.consensus import same_checkpoint
from nanochat.data import choose
from nanochat.data.loader import Rows, document_encoder, one_pass
from nanochat.evaluate.bits_per_byte import bits_per_byte
from nanochat.flags import flag, parse, run_script
from nanochat.hardware import setup as look_at_hardware
from nanochat.locks import turn
from nanochat.run import Run


@dataclass
class Flags:
    run: str = flag("speedrun", "name of the run: its folder under $NANOCHAT_BASE_DIR/runs", "--model-tag", "-g")
    source: str = flag("base", "stage whose model to evaluate: base | mid | sft", "-i")
    data: str = flag("embedded", "embedded | hub | a path to parquet, JSONL or text files")
    device_batch_size: int = flag(32, "rows per device at a time")
    split_tokens: int = flag(40 * 524288, "tokens of each split to evaluate on (at most the whole validation split)")
    device_type: str = flag("", "cuda | cpu | mps (default: the best there is)")


def main() -> None:
    flags = parse(Flags, __doc__ or "")
    hardware = look_at_hardware(flags.device_type)
    run = Run.open(flags.run)
    run.summary("eval")  # a damaged one is an error before the work
    found = same_checkpoint(lambda: run.checkpoint(flags.source))
    tokenizer = run.tokenizer()
    found.check_tokenizer(tokenizer)
    model = found.model(hardware.device, hardware.dtype).eval()
    source = choose.documents(flags.data, flags.split_tokens)
    rows = Rows(flags.device_batch_size, model.config.sequence_len, rank=hardware.rank, world=hardware.world)
    count = max(1, flags.split_tokens // rows.T)
    result: dict = dict(stage=flags.source, step=found.step, data=f"{source.name} {source.fingerprint}")
    result["model"] = found.fingerprint
    for split in ("train", "val"):
        batches = one_pass(source, split, document_encoder(tokenizer), rows, count, tokenizer.bos)
        result[f"{split}_bpb"] = bits_per_byte(model, batches, tokenizer.token_bytes())
        if hardware.is_main:
            print(f"{flags.source}: {split} {result[f'{split}_bpb']:.4f} bits per byte on {source.name}")
    if hardware.is_main:
        with turn(run.stage("eval") / ".lock"):  # another stage may be evaluated at the same time
            run.write_summary("eval", {**(run.summary("eval") or {}), flags.source: result})


if __name__ == "__main__":
    run_script(main)
