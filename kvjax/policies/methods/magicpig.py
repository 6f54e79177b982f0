"""MagicPIG."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import method
from kvjax.policies.selectors.sampling import HashSampling


@method(
    title="MagicPIG: LSH Sampling for Efficient LLM Generation",
    arxiv="2410.16179",
    tiny=dict(read=16, bits=3, tables=8, sink=2, local=4),
)
def magicpig(
    read: int | float = 0.1,
    bits: int = 10,
    tables: int = 150,
    sink: int = 4,
    local: int = 64,
    skip_layers: int = 1,
    seed: int = 0,
) -> Policy:
    """Entries that share a hash with the query in two of `tables` tables, weighted by one over the odds of that.

    out = softmax(q.k - log u) over the sample, u the chance that a key at this angle is sampled: an estimate of attention
    rather than its largest part. Sinks, the prompt's last `local` entries and generated ones are exact. About 2% of the
    entries are sampled in the paper; `read` caps the sample. Hash tables per KV head, a sample per query head, read as
    their union. Layers 0, 16, .. are dense in the paper, here the first `skip_layers`. The hashes take 2 bytes a table:
    in this form, scanned on the device, they save no bandwidth.
    """
    selector = HashSampling(read, sink, 1, skip_layers, bits=bits, tables=tables, local=local, seed=seed)
    return Policy(selector=selector, explicit=frozenset({"selector"}))
