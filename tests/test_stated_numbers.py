"""README.md, GPU.md and experiments/evaluation.md: what they say was measured is what committed results say.

Sentences are made from the results and must stand in the page. A number with a decimal point or a percent sign that is
in none of them must be in STATED: versions, settings, definitions, and what others published.
"""

import json
import re
import statistics
from pathlib import Path

import pytest
from test_compiled_ratios import table

ROOT = Path(__file__).parent.parent


def load(path):
    return json.loads((ROOT / path).read_text("utf-8"))


def of(results, **wanted):
    """The one row of those fields."""
    (found,) = (row for row in results if all(row.get(key) == value for key, value in wanted.items()))
    return found


def numbers(text):
    """Those with a decimal point or a percent sign, outside of code and links."""
    prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", text, flags=re.DOTALL)
    found = re.findall(r"(?<![\w.])\+?\d+(?:\.\d+)?(?:e-\d+)?%?(?![\w]|\.\d)", prose)
    return [number.replace("e-0", "e-") for number in found if "." in number or "%" in number]


def decode():
    results = load("benchmarks/results/decode-cpu.json")
    assert results["machine"] == "AMD EPYC, 2 threads" and results["flags"]["depth"] == 6
    engines = ("ours", "int8", "upstream")
    found = {who: [of(results["rows"], engine=who, batch=batch) for batch in (1, 8, 32)] for who in engines}

    def three(key, who, form="{:.0f}"):
        each = [form.format(row[key]) for row in found[who]]
        return f"{each[0]}, {each[1]} and {each[2]}"

    for row, other in zip(found["ours"] + found["int8"], 2 * found["upstream"]):
        row["times"] = row["tok_per_s"] / other["tok_per_s"]
    yield (
        f"tokens are made {three('times', 'ours', '{:.1f}')} times as fast as nanochat's default (float32) at batch 1, "
        f"8 and 32, with int8 weights {three('times', 'int8', '{:.1f}')} times; the first one comes after "
        f"{three('first_ms', 'ours')} ms instead of {three('first_ms', 'upstream')}; memory at the peak is "
        f"{three('peak_mb', 'ours')} MB, with int8 weights {three('peak_mb', 'int8')}, nanochat's "
        f"{three('peak_mb', 'upstream')}"
    )


def server():
    results = load("benchmarks/results/load-cpu.json")
    stream, leave = results["stream"], results["leave"]
    assert stream["lost"] == 0 and results["machine"] == "AMD EPYC, 2 threads"
    yield (
        f"{stream['clients']} clients streaming at once got {stream['answers']:,} answers, none lost, /health "
        f"answered within {stream['health_p99_ms']:.0f} ms at the 99th percentile; of {leave['clients']} that left in "
        f"mid-answer no slot was taken {leave['freed_ms']:.0f} ms later; {results['batch']['requests']} requests at "
        f"once made {results['batch']['ratio']:.0f} times the tokens per second of one after the other"
    )


def training():
    results = load("benchmarks/results/vs-upstream-cpu.json")
    default, best = (row for row in results["ratios"])
    yield (
        f"a training step makes {default['speed']:.1f} times as many tokens per second as nanochat's default and "
        f"{best['speed']:.1f} times as many as its best setting there (bfloat16), with {default['memory']:.2f} and "
        f"{best['memory']:.2f} of the memory, at the same loss"
    )
    assert all(abs(row["loss"] - 1) < 0.01 for row in results["ratios"])
    second = load("benchmarks/results/h100-second-run.json")
    ratio = second["training_step"]["tok_per_s"] / second["upstream_step"]["tok_per_s"]
    yield f"steps of a model of {second['upstream_step']['depth']} layers at {ratio:.2f} times the speed of nanochat's"


def speedrun():
    results = load("benchmarks/results/speedrun-cpu.json")
    seconds, chat = results["wall_seconds"], results["eval"]["chat"]["sft"]
    memory = max(results[stage]["peak_memory"] for stage in ("base", "mid", "sft") if "peak_memory" in results[stage])
    tokens = sum(results[stage]["tokens"] for stage in ("base", "mid", "sft"))
    rate = {task: chat[task]["rate"] for task in chat}
    assert {chat[task]["n"] for task in chat} == {500} and rate["facts_taught"] == 1
    yield (
        f"{seconds / 60:.0f} minutes with the installation ({seconds:.0f} s), {memory / 2**30:.1f} GiB of memory, "
        f"{tokens / 1e6:.1f} M tokens of training; of 500 questions each, greedy, the model then answers 100% of those "
        f"on facts whose questions are in SFT, {rate['facts_pretrained']:.1%} of those on facts that only pretraining "
        f"stated, {rate['add_tool']:.1%} of the sums with its calculator, and refuses {rate['unknown_names']:.1%} of "
        "those on people who do not exist"
    )
    yield (
        f'read from the letters\' logits: {rate["choice"]:.1%} on the EPYC, where the model says "C" to '
        f"{chat['choice']['letters']['C']['chosen']:.1%} of the questions"
    )
    yield f"{results['base']['parameters']['total'] / 1e6:.0f} million parameters".replace("5", "five")


def neighbours():
    results = load("benchmarks/results/neighbour-cpu.json")
    machine = re.fullmatch(r"(?P<name>.+), (?P<threads>\d+) threads", results["machine"])
    cpu = "an Intel Xeon" if "Intel(R) Xeon(R)" in machine["name"] else f"an {machine['name']}"
    found = {
        way: [of(results["rows"], what=what, way=way) for what in ("train", "evaluate", "decode", "server")]
        for way in ("ours", "libraries")
    }
    kept = {way: [f"{row['share']:.0%}" for row in rows] for way, rows in found.items()}
    idle = [f"{ours['idle'] / other['idle']:.0%}" for ours, other in zip(*found.values(), strict=True)]
    assert all(ours["share"] > other["share"] for ours, other in zip(*found.values(), strict=True))
    yield (
        f"Beside one busy process training goes on at {kept['ours'][0]} of its idle speed, evaluation at "
        f"{kept['ours'][1]}, decoding at {kept['ours'][2]} and the server at {kept['ours'][3]}; as torch and malloc "
        f"do it by themselves it is {kept['libraries'][0]}, {kept['libraries'][1]}, {kept['libraries'][2]} and "
        f"{kept['libraries'][3]}. With no other program ours is {idle[0]}, {idle[1]}, {idle[2]} and {idle[3]} as fast "
        f"as theirs ({machine['threads']} threads of {cpu}"
    )


TASKS = {
    "facts_taught": "facts whose questions are in SFT",
    "facts_pretrained": "facts that only pretraining stated",
    "facts_silent": "facts of people in no conversation",
    "paraphrases": "taught facts in wordings never trained",
    "unknown_names": "people who do not exist: refused",
    "add_tool": "2- and 3-digit sums, tool allowed",
    "add_tool_long": "4- and 5-digit sums",
    "add_head": "2- and 3-digit sums in the head",
    "spelling": "spelling",
    "spelling_new": "spelling a compound that no text has",
    "choice": "multiple choice (four options), answered by writing",
}


def seeds():
    results = load("benchmarks/results/seeds-cpu.json")
    together = results["together"]
    for stage in together:
        for task, found in together[stage].items():  # the file's own means are those of its runs
            values = [run[stage][task] for run in results["runs"].values()]
            assert (min(values), max(values)) == (found["low"], found["high"])
            assert statistics.fmean(values) == pytest.approx(found["mean"])
    span = lambda cell: f"{cell['mean']:.1%} ({cell['low']:.1%} to {cell['high']:.1%})"
    for task, name in TASKS.items():
        yield f"| {name} | " + " | ".join(span(together[stage][task]) for stage in ("base", "mid", "sft")) + " |"
    sft = together["sft"]
    yield (
        f"Known facts that it refuses: {sft['facts_taught refused']['mean']:.1%} of those taught, "
        f"{span(sft['facts_pretrained refused'])} of those only read. Validation after base training: "
        f"{together['base']['validation bits per byte']['mean']:.3f} bits per byte"
    )


def core_and_real_text():
    core, hub = (load(f"benchmarks/results/{name}-cpu.json") for name in ("core", "hub"))
    assert core["differ"] == 0 and core["flags"]["max_per_task"] == 50 and core["environment"]["threads"] == 1
    yield (
        f"{core['speed']:.1f} times as fast ({core['cpu_speed']:.1f} by CPU time) and in {core['memory']:.2f} of the "
        f"memory on the longest task: depth {core['flags']['depth']}, width {core['flags']['width']}, float32, one "
        f"thread of the EPYC, 50 rows of each of {len(core['rows'])} tasks"
    )
    machine = re.search(r"an Intel Xeon with AMX|an AMD EPYC", hub["machine"]).group()
    yield (
        f"{machine} reaches {hub['val_bpb']:.2f} bits per byte on the validation text after "
        f"{hub['training_seconds']:.0f} seconds of base training ({hub['tokens'] / 1e6:.1f} M tokens)"
    )


def compiled():
    yield from table().splitlines()
    pages = load("profiling/compiled/pages.json")["pages"]
    took = [row["wall_s"] for row in pages]
    assert len(pages) == 14 and max(took) < 300
    yield f"the page of one setting took {min(took):.0f} to {max(took):.0f} s on 2 cores of an Intel Xeon"


def h100():
    first, second = (load(f"benchmarks/results/h100-{name}-run.json") for name in ("first", "second"))
    ops = load("benchmarks/results/nvidia-h100-80gb-hbm3.json")["rows"]
    rounding = [row for row in first["fp8_quantize"]["rows"] if (row["rows"], row["columns"]) == (32768, 1536)]
    blocks = {key: rounding[0][key] for key in ("format", "BLOCK_N", "BLOCK_C", "num_warps")}
    before, after = (
        next(row["ms"] for row in rounding if row["how"].startswith(how) and blocks.items() <= row.items())
        for how in ("out of", "written")
    )
    best = min(row["ms"] for row in rounding if row["how"].startswith("written"))
    moved = (2 + 1 + 1) * 32768 * 1536  # bytes: bfloat16 in, two copies in fp8 out
    yield (
        f"takes {after:.3f} instead of {before:.3f} ms for (32,768, 1,536) with the same blocks, {best:.3f} with "
        f"better ones: {moved / best / 1e9:.1f} TB/s"
    )
    both = lambda case, who, op="mlp_relu2": of(ops, op=op, case=case, way="both", contender=who)["median_ms"]
    attention = lambda case, who: f"{both(case, who, 'flash_attention'):.2f}"
    yield (
        f"with a window, forward and backward: {attention('d24', 'triton')} ms, where PyTorch's masked attention takes "
        f"{attention('d24', 'torch, masked')}. Without a window cuDNN's, which PyTorch calls, is faster: "
        f"{attention('d24_full', 'eager')} against {attention('d24_full', 'triton')} ms"
    )
    yield (
        f"at d24 ({both('d24', 'triton'):.2f} ms a layer against torch.compile's {both('d24', 'compiled'):.2f}); "
        f"at d12 it is {both('d12', 'liger') / both('d12', 'triton') - 1:.0%} ahead"
    )
    step, replayed, fp8 = first["training_step"], second["training_step"]["replayed"], second["fp8_step"]
    kept = float(re.match(r"of allocated and reserved, ([\d.]+) GiB", second["memory_note"]).group(1))
    own = lambda run: [f"{run[key] - kept:.2f}" for key in ("allocated_gib", "reserved_gib")]
    yield (
        f"({step['predicted_peak_gib']:.2f} GiB predicted, {step['peak_gib']:.2f} allocated; replayed "
        f"{own(replayed)[0]} and, reserved, {own(replayed)[1]}; in fp8 {own(fp8['replayed'])[0]} and "
        f"{own(fp8['replayed'])[1]})"
    )
    launched = second["training_step"]["launched"]
    yield f"is {launched['launches']:,.0f} launches, in fp8 {fp8['launched']['launches']:,.0f}"
    yield (
        f"In bfloat16 the GPU worked {launched['kernels_ms']:.0f} of {launched['step_ms']:.0f} ms, in fp8 "
        f"{fp8['launched']['kernels_ms']:.0f} of {fp8['launched']['step_ms']:.0f}"
    )
    assert launched["losses"] == replayed["losses"]
    yield (
        f"{replayed['step_ms']:.1f} ms ({replayed['tok_per_s'] / 1e3:.0f},000 tokens/s) and "
        f"{fp8['replayed']['step_ms']:.1f} ms"
    )
    yield f"{second['upstream_step']['tok_per_s'] / 1e3:.0f},000 tokens/s"
    parts, others = second["training_step"]["parts_ms"], fp8["parts_ms"]
    gain, norms = (abs(parts[name] - others[name]) for name in ("products + relu²", "norms, rotary"))
    rounds = others["fp8's rounding"]
    yield f"what the products gain ({gain:.0f} ms) goes into rounding ({rounds:.0f} ms) and norms ({norms:.0f} ms)"
    one, many = (of(second["decode"]["rows"], engine="ours", batch=batch)["tok_per_s"] for batch in (1, 32))
    yield f"{one:,.0f} tokens/s for one sequence and {many:,.0f} for 32"


PAGES = {
    "README.md": (
        (decode, server, training, neighbours, speedrun, seeds, core_and_real_text, compiled),
        # Pythons, addresses, a compute capability, versions of transformers, vLLM and SGLang, a bar, intervals' kind
        "3.10 3.14 127.0.0.1 0.5% 8.0 5.0.0 5.24.0 0.33.0 0.5.23 3.11 2.13.0 95%",
    ),
    "GPU.md": ((h100,), "8.0 7.5 2.11 3.6 2.4 2.11.0 13.0 3.6.0 5% 10%"),
}


def plain(text):
    return " ".join(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).split())


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_says_was_measured_is_what_the_results_say(page):
    text = (ROOT / page).read_text("utf-8")
    makers, stated = PAGES[page]
    known = set(stated.split())
    for sentence in (sentence for make in makers for sentence in make()):
        assert sentence in plain(text), f"{page} does not say: {sentence}"
        known.update(numbers(sentence))
    rl = text[text.find("**Reinforcement learning.**") : text.find("experiments/rl.md")]  # held by test_rl_note.py
    unheld = [number for number in numbers(text.replace(rl, "") if rl else text) if number not in known]
    assert not unheld, f"{page} has numbers of no result: {unheld}"


def evaluation():
    """Every number that experiments/evaluation.md may have, as it would write it."""
    found = load("experiments/evaluation/results.json")
    chat, seeds = (
        load("benchmarks/results/speedrun-cpu.json")["eval"]["chat"]["sft"],
        load("benchmarks/results/seeds-cpu.json"),
    )

    def walk(value):
        if isinstance(value, dict | list):
            for one in value.values() if isinstance(value, dict) else value:
                yield from walk(one)
        elif isinstance(value, float):
            yield value

    for value in walk([found, {task: row["rate"] for task, row in chat.items()}]):
        yield from (f"{value:.1%}", f"{value:.0%}", f"{abs(value):.3f}")
    for part in ("seen", "unseen"):
        yield f"{found['contamination'][part]['right'] / found['contamination'][part]['n']:.1%}"
    yield from (f"{seeds['together']['sft']['paraphrases'][end]:.0%}" for end in ("low", "high"))
    for number in numbers((ROOT / "experiments/evaluation/core-hub-base.txt").read_text("utf-8")):
        value = float(number.strip("+%"))
        yield from (number.lstrip("+"), f"{value:.0f}%", f"{value:.3f}")  # a percentage, or a centred score


def test_every_number_of_what_the_scores_mean_is_one_of_the_results():
    text = (ROOT / "experiments/evaluation.md").read_text("utf-8")
    stated = "95% 100% 2.02 3.4 1.6 0.2565 0.05 0.34 20% 25% 31% 0.7 62% 50%".split()
    known = {*evaluation(), *stated}
    assert len(numbers(text)) > 60
    unheld = [number for number in numbers(text) if number not in known]
    assert not unheld, unheld
