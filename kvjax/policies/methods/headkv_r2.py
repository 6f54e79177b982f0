"""HeadKV-R2."""

from kvjax.policies.base import Policy
from kvjax.policies.methods.headkv import TITLE, build_headkv
from kvjax.policies.methods.snapkv import snapkv
from kvjax.policies.registry import Budget, method


@method(
    title=TITLE,
    arxiv="2410.19258",
    tiny=dict(scorer=snapkv(window=4, kernel=3), heads=((0.1, 0.4), (0.2, 0.3))),
)
def headkv_r2(
    scorer: Policy | str | None = None,
    budget: Budget | None = None,
    heads: str | tuple[tuple[float, ...], ...] = "kvref-22m",
    beta: float = 1.5,
    temp: float = 1.0,
) -> Policy:
    """HeadKV with scores of retrieval and reasoning: all attention that a head puts on the needle counts.

    As headkv; heads reads `retrieval_reasoning` [layers, kv_heads] of the calibration file: at each answer token the
    |needle| most attended tokens add their attention / |needle| when they lie inside the needle.
    """
    return build_headkv("headkv_r2", "retrieval_reasoning", scorer, budget, heads, beta, temp)
