"""LongCache, later ReAttention."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import method
from kvjax.policies.selectors.spans import Spans


@method(
    title="ReAttention: Training-Free Infinite Context with Finite Attention Scope (Farewell to Length Extrapolation)",
    arxiv="2407.15176",
    tiny=dict(read=16, span=4, sink=4, recent=4),
)
def longcache(
    read: int | float = 6176,
    span: int = 32,
    top: int = 4,
    sink: int = 32,
    recent: int | None = None,
    skip_layers: int = 0,
) -> Policy:
    """Spans around the `top` tokens of every query head by q.k without RoPE; one set of spans for all KV heads.

    The spans with most votes are read, beside `sink` and `recent` entries; spans are aligned (the paper centres them on the
    token). read: 32 + 64 spans of 32 + 4,096 recent in the paper. recent: None means 4,096, or half of `read`
    where that is less; of a fraction, one span. All keys are scored, so that it saves no key bandwidth. Attention
    keeps true positions, as the authors' default does.
    """
    if recent is None:
        recent = min(4096, read // 2) if isinstance(read, int) else span
    selector = Spans(read, sink, max(1, recent), skip_layers, span=span, top=top)
    return Policy(selector=selector, explicit=frozenset({"selector"}))
