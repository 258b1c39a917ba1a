"""Talk to a trained model in the terminal. /help lists the commands; Ctrl-C stops an answer, Ctrl-D ends the chat."""

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from nanochat import chat
from nanochat.engine import Engine, Sampling, weights
from nanochat.errors import UserError
from nanochat.flags import SEEDS, flag, number, parse, run_script
from nanochat.hardware import setup as look_at_hardware
from nanochat.run import Run
from nanochat.sandbox import tool as tools
from nanochat.streams import decoded, read_line

Ask = Callable[[list[dict], int, Sampling], Iterator[chat.Event]]
HELP = """  /clear             forget the conversation
  /temperature [x]   show or set: 0 always takes the likeliest token, 1 draws as the model says
  /topk [n]          show or set how many candidates are drawn from (0: all)
  /help              this list; any other line is asked, also one that begins with /
  /quit              end (also Ctrl-D)
Ctrl-C stops an answer."""


@dataclass
class Flags:
    run: str = flag("speedrun", "name of the run: its folder under $NANOCHAT_BASE_DIR/runs", "--model-tag", "-g")
    source: str = flag("", "stage whose model to talk to: base | mid | sft | rl (default: the last there is)", "-i")
    prompt: str = flag("", "answer this and end", "-p")
    temperature: float = number(0.6, 0.0, 2.0, "0: always the likeliest token", "-t")
    top_k: int = number(50, 0, 1 << 20, "candidates to draw from (0: all)", "-k")
    max_tokens: int = number(256, 1, 1 << 20, "longest answer, in tokens", "-m")
    seed: int = number(42, *SEEDS, "of the draw")
    python_tool: bool = flag(False, tools.HELP)
    allow_unsandboxed: bool = flag(False, tools.HELP_UNSANDBOXED)
    device_type: str = flag("", "cuda | cpu | mps (default: the best there is)")
    weights: str = flag("", weights.HELP)


COMMANDS = ("/clear", "/temperature", "/topk", "/help")


def sampling_of(temperature: float, top_k: int, seed: int) -> Sampling:
    """Checked settings. Raises UserError when they are out of range."""
    if not 0 <= temperature <= 2:
        raise UserError(f"temperature is {temperature}, wanted 0 to 2")
    if top_k < 0:
        raise UserError(f"top-k is {top_k}, wanted 0 (all) or more")
    return Sampling(temperature, top_k or None, seed)


def answer(ask: Ask, messages: list[dict], max_tokens: int, sampling: Sampling) -> list[chat.Event]:
    """Streams one answer to the terminal; returns its events, also when Ctrl-C cut it short."""
    events: list[chat.Event] = []
    try:
        for event in ask(messages, max_tokens, sampling):
            events.append(event)
            shown = {"text": "{}", "python": "[python: {}", "python_output": " = {}] "}[event.kind]
            print(shown.format(chat.printable(event.text)), end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print()
    return events


def command(line: str, sampling: Sampling, messages: list[dict]) -> Sampling:
    """Carries out a slash command; returns the settings from now on."""
    name, _, value = line.partition(" ")
    try:
        if name == "/clear":
            messages.clear()
            print("A new conversation.")
        elif name == "/temperature":
            if value:
                sampling = sampling_of(float(value), sampling.top_k or 0, sampling.seed)
            print(f"temperature {sampling.temperature:g}")
        elif name == "/topk":
            if value:
                sampling = sampling_of(sampling.temperature, int(value), sampling.seed)
            print(f"top-k {sampling.top_k or 'all'}")
        else:
            print(HELP)
    except ValueError:
        print(f"{name} wants a number, not {value!r}.")
    except UserError as error:
        print(error)
    return sampling


def converse(ask: Ask, flags: Flags, sampling: Sampling) -> None:
    """The interactive loop."""
    with suppress(ImportError):
        import readline  # noqa: F401 (line editing and history for input())
    messages: list[dict] = []
    turns = 0
    while True:
        try:
            line = read_line("\nYou: ")
        except EOFError:
            return print()
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit ends the chat)")
            continue
        if line in ("/quit", "/exit"):
            return
        if line.split(" ")[0] in COMMANDS:
            sampling = command(line, sampling, messages)
        elif line:
            if line[0] == "/" and line[1:].isalpha():  # a path, and a sentence, has more to it
                print(f"There is no command {line} (/help lists them), so it is asked.")
            messages.append(dict(role="user", content=line))
            print("nanochat: ", end="", flush=True)
            drawn = replace(sampling, seed=sampling.seed + turns)  # asking again may give another answer
            events = answer(ask, messages, flags.max_tokens, drawn)
            messages.append(dict(role="assistant", content=chat.content(events)))
            turns += 1


def main() -> None:
    flags = parse(Flags, __doc__ or "")
    sampling = sampling_of(flags.temperature, flags.top_k, flags.seed)
    tool, hardware = tools.chosen(flags), look_at_hardware(flags.device_type)
    weights.check(flags.weights, hardware.device)
    run = Run.open(flags.run)
    found, tokenizer = run.checkpoint(flags.source or None, older=True), run.tokenizer()
    found.check_tokenizer(tokenizer)
    engine = Engine(found.model(hardware.device, hardware.dtype, hardware.dtype), slots=1, weights=flags.weights)
    ask = partial(chat.stream, engine, tokenizer, tool=tool)
    if flags.prompt:
        answer(ask, [dict(role="user", content=decoded(flags.prompt))], flags.max_tokens, sampling)
        return
    piped = "" if sys.stdin.isatty() else "\n(reading from a pipe: one message a line)"
    print(f"Talking to the {found.meta['stage']} model of run {run.name!r}. /help lists the commands.{piped}")
    converse(ask, flags, sampling)


if __name__ == "__main__":
    run_script(main)
