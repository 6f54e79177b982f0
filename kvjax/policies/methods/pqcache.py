"""PQCache."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import method
from kvjax.policies.selectors.codes import ProductCodes


@method(
    title="PQCache: Product Quantization-based KVCache for Long Context LLM Inference",
    arxiv="2407.12820",
    tiny=dict(read=12, parts=2, bits=3, recent=4),
)
def pqcache(
    read: int | float = 0.2,
    parts: int = 2,
    bits: int = 6,
    sink: int = 4,
    recent: int = 32,
    skip_layers: int = 0,
    rounds: int = 10,
    tail: bool = False,
    over: str = "softmax_max",
    page: int = 1,
) -> Policy:
    """Entries of largest approximate logit, from `parts` codes of `bits` bits a key; the whole cache stays stored.

    Each KV head learns its codebooks from the prompt by k-means, and encodes a key once. The index costs parts * bits
    bits a token (a byte a part where these fill no whole bytes) against 32 * head_dim of its key and value in 16 bits, and
    2**bits codewords a head. The paper chooses per query head; here a group shares one choice, by the largest softmax of
    the approximate logits. sink, recent: entries that are always read. tail (not in the paper): what is not read
    joins as one entry, of the mass that its approximate logits give and the mean value of all entries. page (the paper: 1):
    slots that are chosen and read as one, by their largest score; attention reads pages of 8 to 64 slots without a copy.
    """
    selector = ProductCodes(
        read,
        sink,
        recent,
        skip_layers,
        parts=parts,
        bits=bits,
        rounds=rounds,
        tail=tail,
        over=over,
        page=page,
    )
    return Policy(selector=selector, explicit=frozenset({"selector"}))
