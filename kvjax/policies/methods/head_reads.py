"""Read budgets per head."""

from kvjax.policies.base import Policy
from kvjax.policies.head_scores import head_table
from kvjax.policies.registry import method
from kvjax.policies.selectors.head_reads import HeadReads


@method(
    title="Selection budgets per head (HeadKV's importance, of what is read instead of what is kept)",
    arxiv="2410.19258",
    tiny=dict(heads=((0.1, 0.4), (0.2, 0.3))),
)
def head_reads(heads: str | tuple[tuple[float, ...], ...] = "kvref-22m", beta: float = 1.5) -> Policy:
    """Divides a selector's `read` (a fraction) among the heads: `pqcache(read=0.05) | head_reads`.

    share[l, h] = read (1 - 1/beta) + (read/beta) L H p[l, h], p the retrieval scores normalised over the model, at most 1; the
    mean over all heads stays `read`, and everything stays stored. heads: a calibration file with `retrieval` [layers,
    kv_heads], the name of a shipped one, or the table itself. Alone it does nothing.
    """
    if beta < 1:
        raise ValueError(f"head_reads: beta must be at least 1, got {beta}")
    table, file = head_table("head_reads", heads, "retrieval")
    return Policy(head_reads=HeadReads(table, beta, file), explicit=frozenset({"head_reads"}))
