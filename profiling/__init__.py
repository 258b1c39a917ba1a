"""Where the time goes and how far it is from the limit: `python -m profiling` lists the commands.

Four packages, of which each imports only those named after it: recorded/ (steps that ran, taken apart), compiled/ (the
whole step, compiled for a card that is not here), static/ (every kernel, compiled for such cards), predicted/ (how long
kernels and steps should take). Plots and NVML are beside them.
"""

from nanochat import folders

folders.find()
