"""The whole program for a card that is not here. Start with null_device.py: a CUDA device that needs no GPU."""
