"""Ways in and out: models and data, in the formats of Hugging Face's transformers and of nanochat itself.

Out: hf_model.py, hf_tokenizer.py, card.py (a folder that transformers loads), to_upstream.py, parquet.py. In:
from_hf.py and from_upstream.py read a folder into an `Incoming`, which incoming.py makes a run of. layout.py has the
names and sizes of both sides, moments.py the optimizer's; whole.py the folders that are whole or not there. Nothing
here needs transformers: its formats are JSON and safetensors. modeling_nanochat_kernels.py is not imported: it is
copied, and transformers runs it.
"""
