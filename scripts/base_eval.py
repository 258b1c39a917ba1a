"""CORE, bits per byte and samples of a trained model; CORE of a Hugging Face model too, with its own tokenizer."""

from dataclasses import dataclass, replace

from nanochat.checkpoint import Checkpoint
from nanochat.consensus import from_rank_0, same_checkpoint
from nanochat.data import choose
from nanochat.data.loader import Rows, document_encoder, one_pass
from nanochat.engine import Engine, Request, Sampling
from nanochat.errors import UserError
from nanochat.evaluate import bundle, core_hf, core_output, results
from nanochat.evaluate.bits_per_byte import bits_per_byte
from nanochat.evaluate.core import Model, check, core
from nanochat.evaluate.core_batches import OurModel
from nanochat.evaluate.core_controls import CONTROLS
from nanochat.files import file_name, write_atomically
from nanochat.flags import MANY, SEEDS, flag, number, parse, path, run_script
from nanochat.gpt import GPT
from nanochat.hardware import Hardware
from nanochat.hardware import setup as look_at_hardware
from nanochat.progress import Count
from nanochat.run import Run
from nanochat.tokenizer import Tokenizer

PARTS = ("core", "bpb", "sample")
PROMPTS = ("The capital of France is", "The chemical symbol of water is", "Yesterday was Friday, so tomorrow is",
           "The opposite of hot is", "Two plus three is", "")  # fmt: skip
TOKENS, MOST = dict(cuda=40 * 524288), dict(cuda=1 << 15)  # by device: of each split; that CORE computes at a time


@dataclass
class Flags:
    run: str = flag("speedrun", "name of the run: its folder under $NANOCHAT_BASE_DIR/runs", "--model-tag", "-g")
    source: str = flag("base", "stage whose model to evaluate: base | mid | sft", "-i")
    step: int = number(-1, 0, MANY, "checkpoint of this step (-1: the finished model)")
    hf: str = path("", "instead, CORE of a Hugging Face causal LM, kept beside the run's: a folder or name (extra hf)")
    eval: str = flag("core,bpb,sample", "what to evaluate, comma-separated: core, bpb, sample")
    max_per_task: int = number(-1, 1, MANY, "rows of each CORE task, shuffled (-1: all, which is long on a CPU)")
    controls: bool = flag(False, f"CORE's tasks with something taken away, too: {', '.join(CONTROLS)}")
    few_shot_seed: int = number(bundle.FEW_SHOT_SEED, *SEEDS, "of the draw of CORE's solved examples: another score")
    bundle: str = path("", "folder of the evaluation bundle (default: found, or downloaded)")
    data: str = path("embedded", "text for bits per byte: embedded | hub | a path to parquet, JSONL or text files")
    device_batch_size: int = number(32, 1, 1 << 16, "rows per device at a time")
    split_tokens: int = number(-1, 1, MANY, "tokens of each split, at most all (-1: on a GPU 21 million, else 524,288)")
    device_type: str = flag("", "cuda | cpu | mps (default: the best there is)")


def main() -> None:
    flags = parse(Flags, __doc__ or "")
    parts = flags.eval.split(",")
    for part in parts:
        if part not in PARTS:
            raise UserError(f"--eval names {part!r}; there are {', '.join(PARTS)}")
    if (flags.hf or flags.controls) and "core" not in parts:
        raise UserError(f"{'--hf' if flags.hf else '--controls'} is about CORE, which --eval {flags.eval} leaves out")
    if "core" in parts and (folder := bundle.there(flags.bundle)):
        check(bundle.load(folder), flags.max_per_task)
    run = Run.open(flags.run)
    run.summary("eval")  # a damaged one is an error before the work
    hardware = look_at_hardware(flags.device_type)
    if flags.hf:
        return ask_core(flags, core_hf.load(flags.hf, hardware.device, hardware.dtype), hardware, flags.hf, run)
    found = same_checkpoint(lambda: run.checkpoint(flags.source, flags.step if flags.step >= 0 else None))
    tokenizer = run.tokenizer()
    found.check_tokenizer(tokenizer)
    if hardware.is_main:
        results.check_place(run)
    model = found.model(hardware.device, hardware.dtype).eval()
    if "bpb" in parts:
        text(flags, run, model, tokenizer, hardware, found)
    if "sample" in parts and hardware.is_main:
        samples(found.model(hardware.device, hardware.dtype, hardware.dtype), tokenizer)  # an engine's is its own
    if "core" in parts:
        budget = min(flags.device_batch_size * model.config.sequence_len, MOST.get(hardware.device.type, 1 << 11))
        name = f"{flags.source} of {flags.run}, step {found.step}"
        ask_core(flags, OurModel(model, tokenizer, budget), hardware, name, run, found)


def text(flags: Flags, run: Run, model: GPT, tokenizer: Tokenizer, hardware: Hardware, found: Checkpoint) -> None:
    """Bits per byte of both splits, printed and kept."""
    wanted = flags.split_tokens if flags.split_tokens > 0 else TOKENS.get(hardware.device.type, 524288)
    source = choose.documents(flags.data, wanted)
    rows = Rows(flags.device_batch_size, model.config.sequence_len, rank=hardware.rank, world=hardware.world)
    data = f"{source.name} {source.fingerprint}"
    result: dict = dict(stage=flags.source, step=found.step, data=data, model=found.fingerprint)
    for split in ("train", "val"):
        batches = one_pass(source, split, document_encoder(tokenizer), rows, max(1, wanted // rows.T), tokenizer.bos)
        with Count(f"{split}, tokens", wanted, hardware.is_main) as shown:
            ticking = shown.through(batches, lambda batch: batch.inputs.numel() * rows.world)
            result[f"{split}_bpb"] = bits_per_byte(model, ticking, tokenizer.token_bytes())
        if hardware.is_main:
            print(f"{flags.source}: {split} {result[f'{split}_bpb']:.4f} bits per byte on {source.name}", flush=True)
    if hardware.is_main:
        results.keep_entry(run, flags.source, result)


def samples(model: GPT, tokenizer: Tokenizer) -> None:
    """Greedy continuations of a few beginnings, and one drawn from nothing."""
    engine = Engine(model, slots=1)
    for prompt in PROMPTS:
        ids = [tokenizer.bos, *tokenizer.encode(prompt)]
        most = min(32, model.config.sequence_len - len(ids) - 1)
        if most > 0:
            tokens = list(engine.stream(Request(ids, most, Sampling(0.0 if prompt else 1.0, 50))))
            print(f"{prompt or '(nothing)'} →{tokenizer.decode(tokens)!r}", flush=True)


def ask_core(
    flags: Flags, model: Model, hardware: Hardware, name: str, run: Run, checkpoint: Checkpoint | None = None
) -> None:
    """CORE, printed and kept; of a Hugging Face model (no checkpoint) beside the run's own, where there is that run."""
    found = bundle.load(from_rank_0(lambda: bundle.find(flags.bundle)))
    found = replace(found, tasks=[replace(task, seed=flags.few_shot_seed) for task in found.tasks])
    controls = list(CONTROLS) if flags.controls else []
    shown = core_output.Shown(hardware.is_main)
    shown.begin(found, flags.max_per_task, controls)
    try:
        result = core(model, found, flags.max_per_task, controls, shown)
    finally:
        shown.close()
    if not hardware.is_main:
        return
    print(f"\nCORE of {name}\n{core_output.table(result)}")
    result["bundle"] = bundle.fingerprint(found)
    if checkpoint:
        result.update(step=checkpoint.step, model=checkpoint.fingerprint)
        part, key, file = "core", flags.source, flags.source
    elif run.folder.is_dir():
        part, key = "core_hf", core_hf.label(flags.hf)
        file = f"hf_{file_name(key)}"
    else:
        return print(f"Not kept: there is no run {run.name!r} to keep it beside; --run names one", flush=True)
    write_atomically(run.stage("eval") / f"{file}_core.csv", core_output.as_csv(result))
    results.keep_entry(run, key, result, part)


if __name__ == "__main__":
    run_script(main, goes_on=True)
