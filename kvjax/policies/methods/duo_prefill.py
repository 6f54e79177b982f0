"""DuoAttention's streaming heads in prefill."""

from kvjax.policies.base import Policy
from kvjax.policies.head_scores import head_table
from kvjax.policies.prefill_patterns.static import Streaming
from kvjax.policies.registry import method


@method(
    title="DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads (prefill)",
    arxiv="2410.10819",
    tiny=dict(heads=((0.1, 0.9), (0.8, 0.2)), sink=2, recent=4, block=4),
)
def duo_prefill(
    heads: str | tuple[tuple[float, ...], ...] = "kvref-22m",
    sink: int = 64,
    recent: int = 256,
    sparsity: float = 0.5,
    block: int = 128,
    last: int = 64,
    min_recall: float = 0.0,
    min_tokens: int = 0,
) -> Policy:
    """Streaming heads read sinks and a recent window while a prompt is prefilled; retrieval heads read everything.

    heads: the gates, as for `duoattention`, which frees the streaming heads' entries as well: `duo_prefill |
    duoattention` is the whole method. sparsity: the fraction of KV heads that stream, lowest gate first. With sink=128
    and recent=8192 this is the static part of LServe's prefill (arXiv 2502.14866). min_recall: see `PrefillPattern`.
    """
    table, file = head_table("duo_prefill", heads, "duo")
    pattern = Streaming(
        scores=table, file=file, sparsity=sparsity, sink=sink, recent=recent, sample=last, block=block,
        min_recall=min_recall, min_tokens=min_tokens,
    )  # fmt: skip
    return Policy(prefill=pattern, explicit=frozenset({"prefill"}))
