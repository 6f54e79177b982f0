"""Elastic Cache."""

from kvjax.policies.base import Policy
from kvjax.policies.composing import scoring, wrap
from kvjax.policies.reducers.neighbours import Anchors
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.temporal import LayerMass


@method(
    title="Efficient Inference of Vision Instruction-Following Models with Elastic Cache", arxiv="2407.18121"
)
def elastic_cache(
    scorer: Policy | str | None = None,
    budget: Budget | None = None,
    sink: int | None = None,
    recent: int | None = None,
) -> Policy:
    """Entries that draw little attention are averaged into the nearest anchor in the sequence.

    score[j] = sum over prompt queries of the attention on j, mean over heads; the first `sink` (1) and the last
    `recent` (1) tokens are always anchors. k, v of an anchor become the mean of its cluster. The released code takes
    argsort output for ranks; true ranks are used here. Generated tokens are appended.
    """
    inner = scoring("elastic_cache", scorer, Policy(scorer=LayerMass(), budget=0.5, sink=1, recent=1))
    fields = {k: v for k, v in (("sink", sink), ("recent", recent)) if v is not None}
    return wrap(inner, scorer is not None, budget, reducer=Anchors(), **fields)
