"""Top-k from two levels of key codes."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import method
from kvjax.policies.selectors.refined import RefinedCodes


@method(
    title="Two levels of product codes choose single entries (this project, after PQCache and A2ATS)",
    arxiv="",
    tiny=dict(read=12, parts=2, bits=4, fine_parts=4, fine_bits=2, shortlist=0.5, recent=4),
)
def pq_refined(
    read: int | float = 0.08,
    file: str = "",
    parts: int = 4,
    bits: int = 8,
    fine_parts: int = 16,
    fine_bits: int = 4,
    shortlist: float = 0.1,
    tail: bool = False,
    sink: int = 4,
    recent: int = 8,
    skip_layers: int = 0,
    rounds: int = 10,
    over: str = "softmax_max",
) -> Policy:
    """Single entries of largest logit, found by a short code of every key and a longer one of a shortlist.

    All keys: `parts` codes of `bits` bits (32 bits of the 2,048 of key and value at head_dim 64 in 16 bits, 1.6%). The best
    `shortlist` of them are ranked again with `fine_parts` codes of `fine_bits` bits of what the first code leaves over
    (64 bits: 0.3% more at 0.1). Sharp heads need this: the entry that a head copies from is lost easily among coarse
    logits. file: codebooks for all prompts, in a basis that weighs channels by the model's queries, from `launch.calibrate
    --method=pq_refined` ('kvref-22m' is shipped); '' learns them from each prompt, which adds (2**bits + 2**fine_bits)
    keys a head to the index. tail: what is not read joins as one entry of its estimated mass and the mean value. A group
    of query heads shares one choice by the largest softmax of the approximate logits.
    """
    selector = RefinedCodes(
        read,
        sink,
        recent,
        skip_layers,
        parts=parts,
        bits=bits,
        rounds=rounds,
        tail=tail,
        over=over,
        fine_parts=fine_parts,
        fine_bits=fine_bits,
        shortlist=shortlist,
        file=file,
    )
    return Policy(selector=selector, explicit=frozenset({"selector"}))
