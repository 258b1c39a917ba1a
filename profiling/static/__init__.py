"""Every kernel, compiled for cards that are not here and read as machine code. Start with report.py."""
