"""CompressKV's layer budgets."""

from kvjax.policies.allocators.layers import LayerErrors
from kvjax.policies.base import Policy
from kvjax.policies.composing import scoring, wrap
from kvjax.policies.head_scores import layer_table
from kvjax.policies.methods.snapkv import snapkv
from kvjax.policies.registry import Budget, method


@method(
    title="CompressKV: Semantic Retrieval Heads Know What Tokens are Not Important Before Generation",
    arxiv="2508.02401",
    tiny=dict(scorer=snapkv(window=4, kernel=3), errors=(0.7, 0.3), floor=4),
)
def compresskv_layers(
    scorer: Policy | str | None = None,
    budget: Budget | None = None,
    errors: str | tuple[float, ...] = "kvref-22m",
    floor: int = 32,
) -> Policy:
    """Layers that suffer more from eviction keep more, by errors measured beforehand; for any scorer.

    B_l = floor + e_l (B - floor) L, in [floor, 3 B], what the ceiling cuts goes to the others. errors: a calibration
    file with `layer_errors` [layers] (relative error of the layer's output, sum 1), the name of a shipped one, or the
    numbers. The paper's method is `compresskv(file=...) | compresskv_layers`.
    """
    if floor < 0:
        raise ValueError(f"compresskv_layers: floor must not be negative, got {floor}")
    table, file = layer_table("compresskv_layers", errors, "layer_errors")
    if min(table) < 0 or sum(table) <= 0:
        raise ValueError(f"compresskv_layers: errors must be non-negative and not all zero, got {table}")
    inner = scoring("compresskv_layers", scorer, snapkv())
    return wrap(inner, scorer is not None, budget, allocator=LayerErrors(table, floor, file))
