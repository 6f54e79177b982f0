"""KVCrush."""

from kvjax.policies.base import Policy
from kvjax.policies.composing import scoring, wrap
from kvjax.policies.methods.snapkv import snapkv
from kvjax.policies.registry import Budget, method
from kvjax.policies.selections.chunks import Crush

ANCHORS = ("mean", "zeros", "ones", "alternate")


@method(
    title="KVCrush: Key Value Cache Size-Reduction Using Similarity in Head-Behaviour",
    arxiv="2503.00022",
    tiny=dict(scorer=snapkv(window=4, kernel=3)),
)
def kvcrush(
    scorer: Policy | str | None = None,
    budget: Budget | None = None,
    share: float = 0.25,
    anchor: str = "mean",
) -> Policy:
    """A `share` of the budget goes to representatives of the entries that the scorer (snapkv) would evict.

    An entry's signature has one bit per head, set when its score is in the head's upper half. Evicted entries are
    sorted by Hamming distance to the anchor (mean = majority, zeros, ones, alternate) and picked at even strides:
    O(entries * heads), no pairwise distances. share=0 is the scorer alone.
    """
    if anchor not in ANCHORS:
        raise ValueError(f"kvcrush: anchor must be one of {', '.join(ANCHORS)}, got {anchor!r}")
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"kvcrush: share must be in [0, 1], got {share}")
    inner = scoring("kvcrush", scorer, snapkv())
    return wrap(inner, scorer is not None, budget, selection=Crush(share, anchor))
