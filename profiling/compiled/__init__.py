"""The whole program for a card that is not here. Start with report.py; what it stands on is null_device.py: a CUDA device
that needs no GPU.
"""
