"""CaM."""

from kvjax.policies.base import Policy
from kvjax.policies.composing import scoring, wrap
from kvjax.policies.methods.streaming_llm import streaming_llm
from kvjax.policies.reducers.neighbours import ValueCascade
from kvjax.policies.registry import Budget, method


@method(
    title="CaM: Cache Merging for Memory-efficient LLMs Inference",
    arxiv="",
    tiny=dict(scorer=streaming_llm(sink=2, evict_decode=False), m=4),
)
def cam(
    scorer: Policy | str | None = None, budget: Budget | None = None, m: int = 32, seed: int = 0
) -> Policy:
    """An evicted token's value is added, with a probability, to the next m survivors' values; its key is dropped.

    p = clip(a_e / mean a of those survivors, 0, 1), V_j += b V_e / m with b ~ Bernoulli(p); see ValueCascade. ICML 2024,
    OpenReview LCTmppB165. Scorer: streaming_llm. Merging happens when the prompt, or a chunk of it, is compressed;
    generated tokens are appended.
    """
    if m < 1:
        raise ValueError(f"cam: m must be at least 1, got {m}")
    inner = scoring("cam", scorer, streaming_llm(evict_decode=False))
    return wrap(inner, scorer is not None, budget, reducer=ValueCascade(m, seed))
