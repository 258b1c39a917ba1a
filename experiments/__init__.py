"""Declared experiments, a folder each; README.md has their findings."""
