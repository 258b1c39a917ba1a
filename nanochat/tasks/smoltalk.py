"""SmolTalk: conversations about everything, the bulk of what the chat stages learn; the size for small models.

Source: Allal et al., SmolLM2, arXiv:2502.02737; HuggingFaceTB/smol-smoltalk on the Hub.
"""

from nanochat.data import hub
from nanochat.tasks.rows import Rendered


def conversations(split: str) -> Rendered:
    """Split "train" (460,341) or "test" (24,229)."""
    rows = hub.dataset("HuggingFaceTB/smol-smoltalk", None, split)
    return Rendered(
        rows, lambda row: dict(messages=[dict(role=m["role"], content=m["content"]) for m in row["messages"]])
    )
