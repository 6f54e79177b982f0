"""Compression while decoding, with any scorer."""

from kvjax.policies.base import Policy
from kvjax.policies.composing import scoring, wrap
from kvjax.policies.methods.keydiff import keydiff
from kvjax.policies.registry import Budget, method


@method(
    title="Amortised compression while decoding (kvpress DecodingPress)",
    arxiv="",
    tiny=dict(scorer=keydiff(), interval=3),
)
def decoding(scorer: Policy | str | None = None, budget: Budget | None = None, interval: int = 512) -> Policy:
    """Any scorer (keydiff by default) keeps the cache at its budget during unbounded generation.

    Every `interval` steps each head is cut back to what the prompt was given, so it holds at most budget +
    interval entries; interval=1 evicts one entry per step. The prompt is compressed to the same budget. Scorers that
    need many queries at once (expected_attention, compactor, ...) are refused.
    """
    inner = scoring("decoding", scorer, keydiff())
    return wrap(inner, scorer is not None, budget, evict_decode=True, interval=interval)
