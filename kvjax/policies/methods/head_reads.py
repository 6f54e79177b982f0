"""Read budgets per head."""

from kvjax.policies.base import Policy
from kvjax.policies.head_scores import head_table
from kvjax.policies.registry import method
from kvjax.policies.selectors.head_reads import HeadReads


@method(
    title="Selection budgets per head (HeadKV's importance, of what is read instead of what is kept) and streaming heads",
    arxiv="2410.19258",
    tiny=dict(heads=((0.1, 0.4), (0.2, 0.3))),
)
def head_reads(
    heads: str | tuple[tuple[float, ...], ...] = "kvref-22m",
    beta: float = 1.5,
    streaming: int | float = 0,
    window: float = 0.02,
    sink: int = 4,
    by: str = "retrieval",
) -> Policy:
    """Divides a selector's `read` (a fraction) among the heads: `pqcache(read=0.05) | head_reads`.

    share[l, h] = r (1 - 1/beta) + (r/beta) R p[l, h], p the scores normalised over the R retrieval heads, at most 1; r = (L H read
    - S window) / R, so that the mean over all L H heads stays `read`; everything stays stored. streaming: the S heads of lowest
    score, a fraction of all heads or how many, that read only the first `sink` of their entries and the newest, `window` (a
    fraction) in all, as DuoAttention's streaming heads (arXiv 2410.10819); they have no index and are not scored. heads: a
    calibration file with array `by` [layers, kv_heads], the name of a shipped one, or the table itself. Alone it does nothing.
    ValueError when read is below what streams, or no head is left to the selector.
    """
    if beta < 1:
        raise ValueError(f"head_reads: beta must be at least 1, got {beta}")
    fraction = isinstance(streaming, float)
    if isinstance(streaming, bool) or streaming < 0 or (fraction and streaming >= 1):
        raise ValueError(
            f"head_reads: streaming must be a fraction in [0, 1) or a number of heads, got {streaming}"
        )
    if not 0.0 < window <= 1.0 or sink < 0:
        raise ValueError(
            f"head_reads: window must be a fraction in (0, 1] and sink at least 0, got {window}, {sink}"
        )
    table, file = head_table("head_reads", heads, by)
    part = HeadReads(table, beta, file, streaming, window, sink)
    return Policy(head_reads=part, explicit=frozenset({"head_reads"}))
