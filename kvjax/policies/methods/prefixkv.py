"""PrefixKV."""

from kvjax.policies.allocators.layers import GlobalPrefix
from kvjax.policies.base import Policy
from kvjax.policies.composing import scoring, wrap
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.temporal import LayerMass


@method(
    title="PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need",
    arxiv="2412.03409",
)
def prefixkv(
    scorer: Policy | str | None = None,
    budget: Budget | None = None,
    sink: int | None = None,
    recent: int | None = None,
) -> Policy:
    """Every layer keeps its best entries up to one global level of attention mass, found by bisection.

    score[j] = mean over heads of sum_i A[h, i, j] over all prompt queries, one ranking per layer; with cdf_l the
    cumulative normalised scores in descending order, layer l keeps the least number with cdf_l >= p. 4 sinks and
    the last token are protected. The authors load sizes measured beforehand; here each row is measured itself, and
    generated tokens are appended (theirs drop one old entry at a fixed index instead).
    """
    inner = scoring("prefixkv", scorer, Policy(scorer=LayerMass(), budget=0.5, sink=4, recent=1))
    fields = {k: v for k, v in (("sink", sink), ("recent", recent)) if v is not None}
    return wrap(inner, scorer is not None, budget, allocator=GlobalPrefix(), **fields)
