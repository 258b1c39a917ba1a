"""The course's exercises (LEARN.md): CHAPTERS in their order, each with its picture, its question and its check.

A picture is text that the project's own code prints; a check computes the right answer from the same code, so neither
can be out of date. `python -m scripts.learn` shows and checks.
"""

from nanochat.course import (
    attention,
    chat,
    decode,
    dial,
    gradient,
    kernel,
    loss,
    muon,
    parameters,
    roofline,
    rows,
    step,
    tokens,
)
from nanochat.course.chapter import Chapter

CHAPTERS: tuple[Chapter, ...] = (
    tokens.CHAPTER,
    rows.CHAPTER,
    parameters.CHAPTER,
    attention.CHAPTER,
    loss.CHAPTER,
    gradient.CHAPTER,
    muon.CHAPTER,
    dial.CHAPTER,
    step.CHAPTER,
    decode.CHAPTER,
    chat.CHAPTER,
    kernel.CHAPTER,
    roofline.CHAPTER,
)

__all__ = ["CHAPTERS", "Chapter"]
