"""StreamingLLM."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.recency import Recency


@method(
    title="Efficient Streaming Language Models with Attention Sinks", arxiv="2309.17453", tiny=dict(sink=2)
)
def streaming_llm(
    budget: Budget = 0.5, sink: int = 4, evict_decode: bool = True, interval: int = 1, rerotate: bool = False
) -> Policy:
    """The first `sink` tokens and the most recent ones are kept; the window slides while decoding.

    score[j] = position of j, sinks protected. Keys keep their original positions (kvpress's form); rerotate=True
    is the paper's: keys are rotated to their rank in the cache. interval: decode steps from one eviction to the next.
    """
    return Policy(
        scorer=Recency(),
        budget=budget,
        sink=sink,
        evict_decode=evict_decode,
        interval=interval,
        rerotate=rerotate,
        explicit=frozenset({"scorer"}),
    )
