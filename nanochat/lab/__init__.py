"""The laboratory: controlled experiments that are declared before they run and checked after.

Start with `declaration.py` (what an experiment is), then `runner.py` (a grid over seeds, resumed, never twice),
`estimate.py` (effects, intervals, fits) and `claims.py` (notes that must agree with their tables).
"""
