"""SentenceKV."""

from kvjax.policies.base import Policy
from kvjax.policies.registry import method
from kvjax.policies.scorers.attention import WindowAttention
from kvjax.policies.selectors.sentences import Sentences


@method(
    title="SentenceKV: Efficient LLM Inference via Sentence-Level Semantic KV Caching",
    arxiv="2504.00970",
    tiny=dict(read=12, factor=None, sink=2, recent=4, stops=(0, 1, 2, 3, 4, 5, 6, 7)),
)
def sentencekv(
    read: int | float = 2048,
    factor: float | None = 3.0,
    window: int = 32,
    kernel: int = 7,
    sink: int = 32,
    recent: int = 32,
    skip_layers: int = 0,
    stops: tuple[int, ...] = (1114, 1137, 1150, 1163, 1167, 3284, 8132, 8141, 8149, 8151),
    over: str = "max",
) -> Policy:
    """Whole sentences in order of (mean query of the sentence being written) . (mean key of the sentence).

    First the prompt is pruned as by SnapKV, to `factor` * read entries (max-pooled over `kernel` tokens; None: not at all).
    stops: token ids that end a sentence; the default has . ! ? ; and the line break of kvref-22m's tokenizer. The
    current sentence is read first. The paper chooses per query head; here a group shares the largest score.
    """
    selector = Sentences(read, sink, recent, skip_layers, stops=tuple(stops), over=over)
    if factor is None:
        return Policy(selector=selector, explicit=frozenset({"selector"}))
    if factor < 1:
        raise ValueError(f"sentencekv: factor must be at least 1, got {factor}")
    budget = int(factor * read) if isinstance(read, int) else min(1.0, factor * read)
    return Policy(
        scorer=WindowAttention(window, kernel, "max"),
        budget=budget,
        recent=window,
        selector=selector,
        explicit=frozenset({"scorer", "selector"}),
    )
