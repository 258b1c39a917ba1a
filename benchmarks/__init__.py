"""How fast it is: every op against its peers, whole programs beside others'. README.md says how to read a result."""

from nanochat import folders

folders.find()
