"""A2ATS."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import method
from kvjax.policies.selectors.codes import WindowedCodes


@method(
    title="A2ATS: Retrieval-Based KV Cache Reduction via Windowed Rotary Position Embedding and Query-Aware VQ",
    arxiv="2502.12665",
    # A codeword a key: before RoPE equal tokens have equal keys, and k-means with fewer breaks their ties by rounding.
    tiny=dict(read=12, codes=40, sink=2, recent=4, distance=32),
)
def a2ats(
    read: int | float = 0.03,
    file: str = "",
    codes: int = 256,
    distance: int = 2048,
    sink: int = 8,
    recent: int = 64,
    skip_layers: int = 0,
    rounds: int = 10,
) -> Policy:
    """Entries by the logit of their key's codeword, for the query at one fixed distance.

    Codewords stand for keys before RoPE, nearest in the norm of the queries' second moment. file: what `launch.calibrate
    --method=a2ats` wrote (the paper: 4,096 codewords a head, from 80k tokens); '' learns `codes` of them from each prompt.
    An entry costs 2 bytes of index. The paper takes the union of what the query heads of a group choose; here they share
    `read` entries by the largest softmax of their logits, which is the same order without ties between heads.
    """
    selector = WindowedCodes(
        read, sink, recent, skip_layers, codes=codes, distance=distance, rounds=rounds, file=file
    )
    return Policy(selector=selector, explicit=frozenset({"selector"}))
