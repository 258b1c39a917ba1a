"""The course of LEARN.md: shows a chapter's picture, and checks an answer to its question.

python -m scripts.learn                    the chapters
python -m scripts.learn show 4             the picture and the question of chapter 4
python -m scripts.learn read 4             where the code is that chapter 4 wants read: file:line of each name
python -m scripts.learn check 4 ANSWER     right, or a hint; without ANSWER it asks for one
"""

import argparse
import os
import sys
import textwrap

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is loaded: the course needs no GPU

from nanochat.course import CHAPTERS, Chapter  # noqa: E402
from nanochat.course.reading import readings  # noqa: E402
from nanochat.errors import UserError  # noqa: E402
from nanochat.flags import run_script  # noqa: E402

WRONG = 1  # exit code


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.learn", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "command", nargs="?", choices=("show", "read", "check"), help="without one: a list of the chapters"
    )
    parser.add_argument("chapter", nargs="?", type=int, help=f"1 to {len(CHAPTERS)}")
    parser.add_argument("answer", nargs="*", help="a number, an expression in quotes, a word, or a Python file's path")
    flags = parser.parse_args()
    if flags.command is None:
        for number, chapter in enumerate(CHAPTERS, 1):
            print(f"{number:2}  {chapter.title}")
        return
    if flags.chapter is None or not 1 <= flags.chapter <= len(CHAPTERS):
        said = "no chapter is named" if flags.chapter is None else f"there is no chapter {flags.chapter}"
        raise UserError(f"{said}; they are 1 to {len(CHAPTERS)}: python -m scripts.learn lists them")
    chapter = CHAPTERS[flags.chapter - 1]
    if flags.command != "check":
        if flags.answer:
            raise UserError(f"{flags.command} takes no answer; python -m scripts.learn check {flags.chapter} does")
        if flags.command == "read":
            print(*readings(flags.chapter), sep="\n")
        else:
            print(f"{chapter.picture()}\n\n{asking(chapter)}")
        return
    hint = chapter.check(" ".join(flags.answer) or asked(chapter))
    print(f"Not yet. {hint}" if hint else "Right.")
    if hint:
        sys.exit(WRONG)


def asking(chapter: Chapter) -> str:
    """The question, in lines that a terminal holds."""
    return textwrap.fill(chapter.question, 100)


def asked(chapter: Chapter) -> str:
    """The answer, read from the terminal or a pipe. Raises UserError where none comes."""
    print(asking(chapter))
    print("answer: ", end="", flush=True)
    try:
        answer = sys.stdin.readline()
    except KeyboardInterrupt:
        answer = ""
    if not answer.strip():
        print()
        raise UserError("no answer was given")
    return answer


if __name__ == "__main__":
    run_script(main)
