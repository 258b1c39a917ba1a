"""The whole program for a card that is not here. Start with report.py; it stands on null_device.py, a CUDA device that
needs no GPU.
"""
