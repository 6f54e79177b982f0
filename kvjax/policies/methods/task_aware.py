"""Task-aware compression."""

from kvjax.policies.base import Policy
from kvjax.policies.probes import Fixed
from kvjax.policies.registry import Budget, method
from kvjax.policies.scorers.windows import PromptGuided


@method(
    title="Beyond RAG: Task-Aware KV Cache Compression for Comprehensive Knowledge Reasoning",
    arxiv="2503.04973",
    tiny=dict(instruction=(3, 5, 7), rerotate=False),
)
def task_aware(
    budget: Budget = 0.5,
    instruction: tuple[int, ...] = (),
    window: int = 32,
    normalize: bool = True,
    rerotate: bool = True,
) -> Policy:
    """A corpus is compressed once for a task description, without the question, and then serves many questions.

    The task's token ids run behind every chunk of the context and are forgotten; score[h, j] = mean over the group
    and the task's rows of (visible - 1) A[i, j] (Finch's normalisation); kept keys move to positions 0..K-1. Without
    an instruction the last `window` tokens of the chunk stand for the task.
    """
    return Policy(
        scorer=PromptGuided(len(instruction) or window, normalize),
        probe=Fixed(tuple(instruction)) if instruction else None,
        budget=budget,
        rerotate=rerotate,
        explicit=frozenset({"scorer", "probe"}),
    )
