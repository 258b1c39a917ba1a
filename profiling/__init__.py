"""Where the time goes and how far it is from the limit. Start with simulate.py: a training step, predicted."""
