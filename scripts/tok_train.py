"""Training the tokenizer: byte-level BPE on the text of the run."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from nanochat import checkpoint, fresh
from nanochat.data import choose
from nanochat.data.source import Source
from nanochat.errors import UserError
from nanochat.flags import MANY, flag, number, parse, path, run_script
from nanochat.one_writer import only_writer
from nanochat.progress import Count
from nanochat.run import TRAINED, Run
from nanochat.tokenizer import FILE, LEAST, Tokenizer


@dataclass
class Flags:
    run: str = flag("speedrun", "name of the run: its folder under $NANOCHAT_BASE_DIR/runs", "--model-tag", "-g")
    data: str = path("embedded", "embedded | hub | a path to parquet, JSONL or text files")
    vocab_size: int = number(32768, LEAST, 1 << 24, "tokens in the vocabulary, the 9 special ones included")
    max_chars: int = number(
        -1, 1, MANY, "characters to read at most (-1: 2 million of the embedded world, else 2 billion)"
    )
    doc_cap: int = number(10_000, 1, MANY, "characters of one document, at most")
    fresh: bool = flag(False, "train again although there is a tokenizer")


def texts(source: Source, max_chars: int, doc_cap: int) -> Iterator[str]:
    """The beginning of the training split, up to max_chars characters."""
    left = max_chars
    for unit in range(source.units("train")):
        for text in source.load("train", unit):
            yield text[: min(doc_cap, left)]
            left -= min(len(text), doc_cap)
            if left <= 0:
                return


def main() -> None:
    flags = parse(Flags, __doc__ or "")
    run = Run.open(flags.run)
    with only_writer(run):
        train(flags, run)


def train(flags: Flags, run: Run) -> None:
    folder, whole = run.stage("tokenizer"), lambda place: (place / "summary.json").exists()
    if flags.max_chars < 0:  # the small world has no end, and two million say all that it says
        flags.max_chars = 2_000_000 if flags.data == "embedded" else 2_000_000_000
    wanted = dict(data=flags.data, vocab_size=flags.vocab_size, max_chars=flags.max_chars, doc_cap=flags.doc_cap)
    source = choose.documents(flags.data, flags.max_chars // 4)
    wanted["fingerprint"] = source.fingerprint
    if not flags.fresh and fresh.put_back(folder, whole):
        print("note: tokenizer: training it again came to no end, so the one before is back")
    path = folder / FILE
    made = None if flags.fresh else run.summary("tokenizer")
    there = run.tokenizer() if path.exists() and not flags.fresh else None
    before = made["fingerprint"] if made else there.fingerprint if there else ""  # a lost half is made again, the same
    if made:
        if made["wanted"] != wanted:
            raise UserError(
                f"run {run.name!r} has a tokenizer made with {made['wanted']}, not {wanted}; "
                "give --fresh or another --run"
            )
        if there and there.fingerprint != before:
            raise UserError(
                f"{path} is not the tokenizer that summary.json tells of ({there.fingerprint}, not {before}); "
                "put a copy in its place, or delete it and it is made again"
            )
        if there:
            print(f"tokenizer: already trained, {there.vocab_size:,} tokens ({run.stage('tokenizer')})")
            return
    started, characters = time.time(), 0

    def counted() -> Iterator[str]:
        nonlocal characters
        with Count("tokenizer, characters", flags.max_chars, True) as count:
            for text in count.through(texts(source, flags.max_chars, flags.doc_cap), len):
                characters += len(text)
                yield text
        print(f"tokenizer: {characters:,} characters read; learning {flags.vocab_size:,} tokens", flush=True)

    print(f"tokenizer: reading at most {flags.max_chars:,} characters of {source.name}", flush=True)
    tokenizer = Tokenizer.train(counted(), flags.vocab_size)
    seconds = time.time() - started
    if before and tokenizer.fingerprint != before:
        raise UserError(
            f"run {run.name!r} has a tokenizer {before}, of which {'the file' if made else 'summary.json'} is lost, "
            f"and these flags and data give another, {tokenizer.fingerprint}; give those it was made with, or --fresh"
        )
    check_trained(run, tokenizer)
    fresh.set_aside(folder, whole)
    tokenizer.save(folder)
    summary = dict(wanted=wanted, characters=characters, seconds=seconds, fingerprint=tokenizer.fingerprint)
    run.write_summary("tokenizer", dict(summary, vocab_size=tokenizer.vocab_size))
    fresh.forget(folder)
    print(
        f"tokenizer: {tokenizer.vocab_size:,} tokens from {characters:,} characters of {source.name} in {seconds:.1f} s"
    )


def check_trained(run: Run, tokenizer: Tokenizer) -> None:
    """Raises UserError when models of the run are of another tokenizer: without it they would be of no use."""
    for stage in TRAINED:
        found, _ = checkpoint.newest(run.stage(stage), verify=False)
        if found and found.meta["tokenizer"] != tokenizer.fingerprint:
            raise UserError(
                f"{run.stage(stage)} was trained with tokenizer {found.meta['tokenizer']}, and could not be used with "
                f"this one, {tokenizer.fingerprint}; give another --run, or delete it first"
            )


if __name__ == "__main__":
    run_script(main, goes_on=True)
