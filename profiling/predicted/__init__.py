"""How long kernels and whole steps should take, before anything was run. Start with simulate.py."""
