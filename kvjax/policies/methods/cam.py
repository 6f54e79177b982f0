"""CaM."""

from kvjax.policies.base import Policy
from kvjax.policies.composing import scoring, wrap
from kvjax.policies.methods.streaming_llm import streaming_llm
from kvjax.policies.reducers.neighbours import ValueCascade
from kvjax.policies.registry import Budget, method


@method(
    title="CaM: Cache Merging for Memory-efficient LLMs Inference",
    arxiv="",
    tiny=dict(scorer=streaming_llm(sink=2), m=4),
)
def cam(
    scorer: Policy | str | None = None, budget: Budget | None = None, m: int = 32, seed: int = 0
) -> Policy:
    """An evicted token's value is added, with a probability, to the next m survivors' values; its key is dropped.

    p = clip(a_e / mean a of those survivors, 0, 1), V_j += b V_e / m with b ~ Bernoulli(p); see ValueCascade. ICML 2024,
    OpenReview LCTmppB165. Scorer: streaming_llm (the authors' layout: start and recent tokens). Every decode step
    merges the entry that it evicts, with the attention of its query; so does the compression of a prompt or chunk, with
    the attention received from all its queries (the authors' streaming variant sums over the queries likewise).
    """
    if m < 1:
        raise ValueError(f"cam: m must be at least 1, got {m}")
    inner = scoring("cam", scorer, streaming_llm())
    return wrap(inner, scorer is not None, budget, reducer=ValueCascade(m, seed))
