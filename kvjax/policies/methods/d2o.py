"""D2O."""

import dataclasses

from kvjax.policies.allocators.layers import Density
from kvjax.policies.base import Policy
from kvjax.policies.composing import scoring, wrap
from kvjax.policies.methods.h2o import h2o
from kvjax.policies.reducers.similar import MergeSimilar
from kvjax.policies.registry import Budget, method


@method(
    title="D2O: Dynamic Discriminative Operations for Efficient Long-Context Inference of Large Language Models",
    arxiv="2406.13035",
    tiny=dict(scorer=h2o(recent=4), first=0, last=0),
)
def d2o(
    scorer: Policy | str | None = None,
    budget: Budget | None = None,
    first: int = 2,
    last: int = 1,
    threshold: float | None = None,
    weights: str = "cosine",
) -> Policy:
    """Layers with concentrated attention keep less; losers that resemble a survivor are merged into it, others vanish.

    Layer shares: softmax(-u), u = the variance over keys of the attention received; the first and last layers stay
    whole where the budget allows (the authors do so beyond the budget). A loser merges when its best cosine reaches
    `threshold`, or the authors' moving one: the mean over the prompt's losers, then half the old and half the mean of
    each decode step, which evicts and merges one entry a head; see MergeSimilar, also for what differs from their code.
    Scorer: h2o with 4 sinks. The prompt is compressed when it ends, not at the first decode step.
    """
    if min(first, last) < 0 or weights not in ("cosine", "normalised"):
        raise ValueError(
            f"d2o: first and last must not be negative, weights cosine or normalised, got {weights!r}"
        )
    own = dataclasses.replace(h2o(), sink=4)
    inner = scoring("d2o", scorer, own)
    parts = dict(allocator=Density(first, last), reducer=MergeSimilar(threshold, weights))
    return wrap(inner, scorer is not None, budget, **parts)
