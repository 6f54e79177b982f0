"""HeadKV."""

from typing import Any

from kvjax.policies.allocators.heads import HeadImportance
from kvjax.policies.base import Policy
from kvjax.policies.composing import scoring, wrap
from kvjax.policies.head_scores import head_table
from kvjax.policies.methods.snapkv import snapkv
from kvjax.policies.registry import Budget, method

TITLE = (
    "Not All Heads Matter: A Head-Level KV Cache Compression Method with Integrated Retrieval and Reasoning"
)


def build_headkv(
    name: str, key: str, scorer: Any, budget: Budget | None, heads: Any, beta: float, temp: float
) -> Policy:
    """The policy that HeadKV and HeadKV-R2 share; they differ in the array `key` of the calibration file."""
    if beta < 1 or temp <= 0:
        raise ValueError(f"{name}: beta must be at least 1 and temp positive, got beta={beta}, temp={temp}")
    table, file = head_table(name, heads, key)
    inner = scoring(name, scorer, snapkv(window=8, kernel=7, pooling="max"))
    return wrap(inner, scorer is not None, budget, allocator=HeadImportance(table, beta, temp, file))


@method(
    title=TITLE,
    arxiv="2410.19258",
    tiny=dict(scorer=snapkv(window=4, kernel=3), heads=((0.1, 0.4), (0.2, 0.3))),
)
def headkv(
    scorer: Policy | str | None = None,
    budget: Budget | None = None,
    heads: str | tuple[tuple[float, ...], ...] = "kvref-22m",
    beta: float = 1.5,
    temp: float = 1.0,
) -> Policy:
    """Heads that retrieve keep more: a pool of b / beta entries a head is shared by retrieval score.

    cap[l, h] = p[l, h] (b / beta) L H + (b - b / beta) + window, b = budget - window, p = score^temp normalised over
    the model. heads: a calibration file with `retrieval` [layers, kv_heads] (the score of a KV head is the mean over
    its query heads), the name of a shipped one, or the table itself. What a head cannot use goes to the others;
    the authors lose it.
    """
    return build_headkv("headkv", "retrieval", scorer, budget, heads, beta, temp)
