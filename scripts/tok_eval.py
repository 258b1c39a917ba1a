"""How well the run's tokenizer compresses: bytes per token on its own validation text and on other kinds of text.

GPT-2's and GPT-4's tokenizers stand beside it where tiktoken can get them (it downloads them once).
"""

from dataclasses import dataclass

import tiktoken

from nanochat.data import choose
from nanochat.data.source import first_items
from nanochat.errors import UserError
from nanochat.flags import flag, parse, path, run_script
from nanochat.one_writer import only_writer
from nanochat.run import Run
from nanochat.tokenizer import splittable

OTHER_TEXT = {
    "news": "The river rose by two metres overnight, the mayor said, and by noon the old bridge had been closed. "
    "Farmers in the valley moved their cattle to higher ground while volunteers filled bags with sand.",
    "code": "def gcd(a: int, b: int) -> int:\n    while b:\n        a, b = b, a % b\n    return a\n\n\n"
    'if __name__ == "__main__":\n    print(gcd(1071, 462))\n',
    "mathematics": "Let $f(x) = x^2 - 3x + 2$. Then $f(1) = 0$ and $f(2) = 0$, so $f(x) = (x - 1)(x - 2)$; its "
    "minimum is at $x = 3/2$, where $f(3/2) = -1/4$. 1024 * 768 = 786432.",
    "German": "Der Zug nach Würzburg fährt heute von Gleis sieben ab; er kommt heute zwölf Minuten später an.",
    "Japanese": "春になると川のそばの桜が咲いて、たくさんの人が花を見に来ます。",
}


@dataclass
class Flags:
    run: str = flag("speedrun", "name of the run: its folder under $NANOCHAT_BASE_DIR/runs", "--model-tag", "-g")
    data: str = path("embedded", "embedded | hub | a path: whose validation text to compress")


def main() -> None:
    flags = parse(Flags, __doc__ or "")
    run = Run.open(flags.run)
    tokenizer, summary = run.tokenizer(), run.summary("tokenizer")
    if summary and summary["fingerprint"] != tokenizer.fingerprint:
        raise UserError(f"{run.stage('tokenizer')}: tokenizer.json and summary.json do not belong together")
    source = choose.documents(flags.data, 0)
    validation = "\n".join(first_items(source, "val", 200))
    if not validation.strip():
        raise UserError(f"{source.name} has nothing but blank texts in its validation split")
    texts = {"validation": validation, **OTHER_TEXT}
    encoders = {"ours": tokenizer.encode}
    for title, name in (("GPT-2", "gpt2"), ("GPT-4", "cl100k_base")):
        try:
            encoders[title] = tiktoken.get_encoding(name).encode_ordinary
        except Exception as error:  # the download fails in many ways, all meaning the same
            print(f"{title}'s tokenizer cannot be had here ({type(error).__name__}), so it is not compared")
    sizes = {"ours": tokenizer.vocab_size, "GPT-2": 50257, "GPT-4": 100277}
    print(f"bytes per token on {source.name}; more is better")
    print(f"{'':12}" + "".join(f"{f'{title} ({sizes[title]:,})':>18}" for title in encoders))
    table = {}
    for kind, text in texts.items():
        size = len(text.encode())
        parts = splittable(text)
        table[kind] = {title: size / sum(len(encode(part)) for part in parts) for title, encode in encoders.items()}
        print(f"{kind:12}" + "".join(f"{ratio:18.2f}" for ratio in table[kind].values()))
    with only_writer(run):
        summary = run.summary("tokenizer")
        if summary is None:
            print("note: summary.json of the tokenizer is missing, so nothing is noted there; tok_train makes it again")
            return
        run.write_summary("tokenizer", {**summary, "bytes_per_token": table})


if __name__ == "__main__":
    run_script(main, goes_on=True)
