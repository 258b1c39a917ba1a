"""What goes wrong through the user's input, reported in one sentence, and the exit codes that scripts end with."""

import re


class UserError(Exception):
    """Wrong use or bad input: what is wrong, where, and what to do. Scripts print it and exit with code 2."""


# Control characters and bytes that are no letters, as Python writes them: the names of files may have any.
CONTROLS = {
    code: repr(chr(code))[1:-1] for code in (*range(32), *range(127, 160), 0x2028, 0x2029, *range(0xD800, 0xE000))
}


LONG = re.compile(r"(\S{150})\S{150,}(\S{100})")  # a word that nobody reads to its end


def one_line(text: str) -> str:
    """The text with what would end the line, or command a terminal, written out, and words without end cut."""
    return LONG.sub(r"\1…\2", text.translate(CONTROLS))


def is_number(word: str) -> bool:
    """Whether a word is a whole number that `int` reads: nine ASCII digits at most. `isdigit` alone takes ² as well."""
    return word.isascii() and word.isdigit() and len(word) < 10


EXIT_USAGE = 2
EXIT_INTERRUPTED = 75  # stopped by a signal after saving: the same command again goes on (sysexits' "try again")
EXIT_AFTER = 74  # of a rank that ends because another has failed, which has said why
