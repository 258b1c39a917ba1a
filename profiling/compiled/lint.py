"""What no kernel of a compiled program should do: spill, compute in float64, access memory narrowly where it streams.

The exceptions, each with its reason, are in `EXCEPTIONS` and `OF_SMALL`, and those of programs without our kernels in
`REFERENCES`.
"""

import re
from typing import Any

from profiling.compiled.launches import NOT_STREAMING

STREAMS = 32e6  # bytes: a launch that moves so many is bound by the memory, if it does not multiply
SMALL = 1e6  # bytes: a launch that moves less takes as long as a launch
# (kernel's name, fault): regular expressions → why that is accepted.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("triton_red_fused.*mul_neg_sum", "[28] bytes at a time"): "the gradient of backout's lambda, one sum over a "
    "tensor: Inductor cuts it by the card's multiprocessors, into parts that are short or no multiple of 16 bytes",
    ("triton_poi_fused.*_cat_(index_mul|mul_sigmoid)_slice", "4 bytes at a time"): "the smear after an embedding's "
    "norm that Inductor fuses: what streams is touched 16 bytes at a time; beside it an element loads its row's root "
    "from cache",
    ("triton_red_fused.*_index_mul_sigmoid", "8 bytes at a time"): "the gradient of a value embedding's gate, a sum "
    "over a head of a row that begins where a token says: Inductor makes blocks of two rows of 128, in which a thread "
    "has four neighbours; kept from forward the row would be read wider, but written as well",
    ("triton_red_fused(.*_index_mean_pow_rsqrt|_linalg_vector_norm)", "8 bytes at a time"): "the norms of an "
    "embedding, which Inductor fuses with the lookup, and of an update before it is made orthogonal: rows of 1024 to "
    "2048 are dealt out to so many threads that each has 4 neighbours",
    ("triton_red_fused.*_pow_sum", "4 bytes at a time"): "Muon's second moments of wide matrices where PyTorch makes "
    "them (as `auto` has it on cards where ours moves no fewer bytes), summed down the columns: each thread has two; a "
    "warp's are neighbours",
}
# The same, of launches that move less than SMALL.
OF_SMALL: dict[tuple[str, str], str] = {
    ("_symmetric_kernel", r"spills \d\d bytes"): "the gates' banks: blocks made for wide matrices "
    "hold few of their columns",
}
# With kernels=torch, read in the sources that Inductor generates: what our kernels are there for.
REFERENCES: dict[tuple[str, str], str] = {
    ("triton_red_fused.*prepare_softmax_online", r"spills \d+ bytes"): "the head's softmax and its gradient: two "
    "loops over the vocabulary, the first with a maximum and a sum in registers for each column of Inductor's block",
    ("triton_.*scaled_mm.*clone", "[1248] bytes at a time"): "an fp8 copy and its transpose stored by one kernel "
    "without shared memory between: one of the two is written across its rows",
    ("triton_(per|red)_fused.*(_cat_|slice_backward)", "[48] bytes at a time"): "rotary's two halves, the smear, and "
    "attention's gradients by blocks: the 128 or 256 numbers of a row are dealt out to so many threads that each has "
    "2 or 4; a warp's are neighbours",
    ("triton_red_fused.*abs_amax_mul_relu", "4 bytes at a time"): "the largest of relu²: of Inductor's block each "
    "thread has two neighbours",
}


def violations(found: dict[str, Any]) -> dict[tuple[str, str], tuple[int, int]]:
    """What kernels of a program do that they should not: (name, fault) → (bytes of the largest launch, launches)."""
    rows: dict[tuple[str, str], tuple[int, int]] = {}
    for launch in found["launches"]:
        if said := ", ".join(faults(launch, found["kernels"].get(launch["kernel"], {}))):
            largest, times = rows.get((launch["name"], said), (0, 0))
            rows[launch["name"], said] = max(largest, launch["bytes"]), times + 1
    return dict(sorted(rows.items(), key=lambda row: -row[1][0]))


def faults(launch: dict[str, Any], kernel: dict[str, Any]) -> list[str]:
    """Of a launch, by what its kernel is on the card (keys of targets.UNREAD; empty: a library's)."""
    found = []
    streams = launch["category"] not in NOT_STREAMING and launch["bytes"] >= STREAMS
    if streams and kernel.get("access_bytes") and kernel["access_bytes"] < 16:
        found.append(f"{kernel['access_bytes']} bytes at a time")
    if kernel.get("spill_bytes") and not kernel.get("spill_reason"):
        found.append(f"spills {kernel['spill_bytes']} bytes")
    if kernel.get("float64_instructions"):
        found.append("float64")
    return found


def exempt(kernel: str, fault: str, largest: int, reference: bool = True) -> str:
    """The reason of an exception, of programs without our kernels too if `reference`; "" where there is none.

    largest: bytes of the largest launch with this fault.
    """
    rules = EXCEPTIONS | (OF_SMALL if largest < SMALL else {}) | (REFERENCES if reference else {})
    matches = (why for (name, what), why in rules.items() if re.search(name, kernel) and re.fullmatch(what, fault))
    return next(matches, "")
