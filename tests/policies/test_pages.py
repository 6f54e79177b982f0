"""Pages of the Ragged layout are such as the platform's kernels read."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache.plan import Plan
from kvjax.policies import parse
from kvjax.types import ModelShape
from pallas_kernels import formats
from pallas_kernels.decode_attention import gpu_limits

SHAPE = ModelShape(2, 8, 2, 128, (None, None), "bfloat16", 4096)


@pytest.mark.parametrize(
    "codec, platform, want",
    [
        ("full", "", 16),
        ("full", "gpu", 16),
        ("int8", "", 16),
        ("int8", "gpu", 64),
        ("fp8", "gpu", 64),
        ("int8", "tpu", 32),
        ("full", "tpu", 32),
        ("kivi(bits=4, group=64)", "gpu", 64),
        ("kivi(bits=2, group=64)", "gpu", 128),
    ],
)
def test_page_size_of_a_platform(codec, platform, want):
    plan = Plan(parse(f"keydiff(budget=0.5) | adakv | {codec}"), SHAPE, 2, 512, 8, platform=platform)
    pool = plan.layers[0]
    assert plan.page(pool.policy) == want
    if platform != "gpu":
        return
    page = plan.page(pool.policy)
    k = jnp.zeros((4, page, 128), jnp.bfloat16)
    fields = pool.policy.codec.fields(128, "bfloat16")
    fmt = getattr(pool.policy.codec, "format", formats.DENSE)
    assert set(fields) >= {"k", "v"}
    store = formats.encode(k, k, fmt, group=64)
    table, lengths = jnp.zeros((2, 2, 2), jnp.int32), jnp.full((2, 2), page, jnp.int32)
    q = jnp.zeros((2, 8, 1, 128), jnp.bfloat16)
    layout = dict(table=table, blocks=None, block_size=None)
    assert gpu_limits.unsupported(q, store, lengths=lengths, positions=None, mask=None, **layout) is None


def test_larger_pages_cost_what_they_round_up():
    small, large = (
        Plan(parse("keydiff(budget=0.5) | adakv | int8"), SHAPE, 2, 512, 8, platform=p) for p in ("", "gpu")
    )
    heads, slot = (
        2 * 2 * 2,
        2 * (128 + 4) + 4,
    )  # rows, heads, layers; codes and scales of k and v, and the position
    more = large.nbytes() - small.nbytes()
    assert 0 < more <= heads * 2 * 64 * slot + np.ceil(512 / 16) * heads * 4
