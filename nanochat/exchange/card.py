"""The model card of an exported folder: what it is, how to use it, and the run's own report, failures included."""

from nanochat import render, report, scores
from nanochat.checkpoint import Checkpoint
from nanochat.cost import parameter_counts
from nanochat.exchange import layout
from nanochat.render import Figure, Section
from nanochat.run import Run

VERSIONS = "5.0 to 5.24"  # of transformers, whose ends are tried by tests/test_exchange_hf.py
SERVERS = (
    "No version of vLLM or SGLang has been tried. As released, vLLM 0.33.0 and SGLang 0.5.23 name this architecture "
    "nowhere; both have a generic backend for classes of transformers"
)
SERVER_ENDS = {
    layout.STOCK: ", which NanoChatForCausalLM declares that it supports.",
    layout.OWN: ", which the file in this folder does not support: it has its own attention.",
}


def text(run: Run, found: Checkpoint, model_type: str, dtype: str) -> str:
    """Markdown with the Hub's front matter."""
    own, stage = model_type == layout.OWN, found.meta["stage"]
    config, total = found.config, parameter_counts(found.config)["total"]
    flag = ", trust_remote_code=True" if own else ""
    tags = ["nanochat", "conversational"] if stage != "base" else ["nanochat"]
    front = ["---", "license: mit", "library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    front += [*(f"- {tag}" for tag in tags), "---"]
    blocks = [
        "\n".join(front),
        f"# {run.name}: {stage} model",
        f"A language model of {total:,} parameters ({config.n_layer} layers, width {config.n_embd}, context "
        f"{config.sequence_len}, {config.vocab_size:,} tokens), step {found.step}, made with nanochat-kernels, a "
        "derivative of Andrej Karpathy's nanochat. It is small: it knows little, and what it says of what it does not "
        "know is often invented.",
        "## Use",
        _usage(stage, flag),
        f"Weights are {dtype}. transformers {VERSIONS}"
        + (
            "; trust_remote_code runs the file modeling_nanochat_kernels.py of this folder, read it first."
            if own
            else "."
        ),
        "A message's `<|bos|>` and the like stay text in the chat template; given to the tokenizer alone they are "
        "special tokens, but with `split_special_tokens=True`. Tool calls are parts of the assistant's content: a list "
        'of `{"type": "text" | "python" | "python_output", "text": …}`. The tokenizer puts no `<|bos|>` before a plain '
        "text, and each document began with one in training.",
        SERVERS + SERVER_ENDS[model_type],
        _origin(found),
    ]
    sections = [
        report.tokenizer(run),
        report.stages(run),
        *scores.sections(run),
        report.knowledge(run),
        report.samples(run),
    ]
    shown = [Section(one.title, [block for block in one.blocks if not isinstance(block, Figure)]) for one in sections]
    numbers = render.markdown("", [one for one in shown if one.blocks], links=False).removeprefix("# \n").strip()
    blocks += [
        numbers or "## Numbers\n\nThis run has no evaluations: nothing is known of how good its answers are.",
        "## Licence",
        "MIT for these weights, this card and the code that came with them. The data has its own terms: see the names "
        "above.",
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _usage(stage: str, flag: str) -> str:
    load = (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("."{flag})\n'
        f'model = AutoModelForCausalLM.from_pretrained("."{flag})\n'
    )
    if stage == "base":
        return load + (
            'ids = tokenizer("<|bos|>The capital of France is", return_tensors="pt")\n'
            "print(tokenizer.decode(model.generate(**ids, max_new_tokens=32)[0]))\n```"
        )
    return load + (
        'messages = [{"role": "user", "content": "Hello!"}]\n'
        "ids = tokenizer.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n)\n'
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=128)[0]))\n```"
    )


def _origin(found: Checkpoint) -> str:
    """Where the weights came from, of a run that was imported."""
    return found.meta.get("imported", "")
