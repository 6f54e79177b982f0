"""Scorers x ragged allocators x codec families: every composition builds the cache that its plan promises."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax.policies as P
from kvjax import arrays
from kvjax.cache import deferred, ops
from kvjax.cache.plan import Plan
from kvjax.codecs.base import Plain
from kvjax.codecs.precision import PerLayer
from kvjax.generation import engine
from kvjax.policies.base import Policy
from kvjax.policies.registry import build, lookup
from kvjax.types import ModelShape
from tests.toy import Toy, ragged, steps

LM = Toy()
LENGTHS = (40, 29, 17)
NAMES = P.names()


def tiny(name, **kwargs):
    return build(name, **{**lookup(name).tiny, **kwargs})


CODECS = [n for n in NAMES if tiny(n).codec != Plain() and tiny(n).scorer is None]
RAGGED = [n for n in NAMES if tiny(n).allocator.ragged]
# One of each kind: heads compete in a layer, heads compete in the model (one pool), layers compete, a probe.
KINDS = ("adakv", "headkv", "cake", "kvzip")
PAIRS = [pytest.param(a, c, marks=[] if a in KINDS else [pytest.mark.slow]) for a in RAGGED for c in CODECS]


def composed(allocator, codec, scorer=None):
    policy = tiny(allocator, **({} if scorer is None else {"scorer": scorer})) | tiny(codec)
    if policy.codec.deferred:  # does not evict while decoding
        policy = dataclasses.replace(policy, evict_decode=False, interval=1)
    return policy


def traced(lm, plan, width):
    """Shapes after prefill and a step, as {path: (shape, dtype)}."""
    tokens = jax.ShapeDtypeStruct((plan.batch, width), jnp.int32)

    def run(params, tokens, positions):
        _, cache = engine.prefill.__wrapped__(lm, plan, params, tokens, positions)
        active = jnp.ones(plan.batch, bool)
        return cache, engine.step(lm, plan, params, cache, tokens[:, 0], active)[1]

    filled, after = jax.eval_shape(run, jax.eval_shape(lm.init), tokens, tokens)
    flat = jax.tree_util.tree_leaves_with_path
    return [{jax.tree_util.keystr(k): (x.shape, x.dtype.name) for k, x in flat(c)} for c in (filled, after)]


def promised(plan):
    flat = jax.tree_util.tree_leaves_with_path(plan.specs(), is_leaf=arrays.is_spec)
    return {jax.tree_util.keystr(k): (s.shape, s.dtype) for k, s in flat}


@pytest.mark.parametrize(("allocator", "codec"), PAIRS)
def test_every_codec_in_every_ragged_layout(allocator, codec):
    """Deferred and immediate codecs alike; what cannot be is refused in one line that names a part to change."""
    policy = composed(allocator, codec, "keydiff" if allocator in ("adakv", "headkv") else None)
    refused = codec == "aqua_kv" or (allocator == "razorattention" and policy.codec.deferred)
    if refused:
        with pytest.raises(ValueError, match=r"compose|needs a codec of single tokens") as error:
            Plan(policy, LM.shape, 3, 40, 8, page_size=4)
        assert "\n" not in str(error.value)
        return
    plan = Plan(policy, LM.shape, 3, 40, 8, page_size=4)
    assert traced(LM, plan, 40) == [promised(plan)] * 2


@pytest.mark.parametrize("codec", ["cq(bits=2)", "kvtuner", "csr"])
def test_shipped_calibrations_whose_layers_differ(codec):
    """One pool for layers of different codes: pages are as wide as the widest, and each layer decodes its own."""
    lm = Toy(layers=12, q_heads=6, kv_heads=2, head_dim=64)
    policy = P.parse(f"keydiff(budget=0.25, sink=4, recent=8) | headkv | {codec}")
    plan = Plan(policy, lm.shape, 1, 256, 16)
    got = traced(lm, plan, 256)
    assert got == [promised(plan)] * 2
    own = [P.parse(codec).codec.for_layer(i, lm.shape) for i in range(12)]
    for name, spec in plan.pool_specs[0].store.items():
        widest = max(c.fields(64, "float32")[name].suffix for c in own)
        assert spec.shape[2:] == widest


@pytest.mark.parametrize(("pairs", "residual"), [(((8, 4), (2, 4)), 0), (((4, 2), (8, 8)), 6)])
def test_layers_of_different_precision_keep_their_codes_in_a_shared_pool(pairs, residual):
    """Decoded entries and logits are those of the same codec with a pool for each layer."""
    codec = PerLayer(pairs, channels=8, residual=residual)
    coded = Policy(codec=codec, explicit=frozenset({"codec"}))
    params = LM.init()
    tokens, positions = ragged(LENGTHS, 40)
    table = ((0.1, 0.4), (0.2, 0.3))
    policy = P.parse(build("headkv", scorer=build("keydiff", budget=0.5), heads=table)) | coded
    plan = Plan(policy, LM.shape, 3, 40, 8, page_size=4)
    assert {lp.pool for lp in plan.layers} == {0}
    _, cache = engine.prefill(LM, plan, params, tokens, positions)
    counts = [np.asarray(cache.layers[i].fill) for i in range(2)]
    late = [0 if residual == 0 else np.asarray(cache.layers[i].residual.count) for i in range(2)]
    # The same entries under fixed budgets per head, whose layers have pools of their own.
    row, after = 1, np.full((3, 4), 7)
    budgets = tuple(tuple(int(x) for x in (counts[i] + late[i])[row]) for i in range(2))
    alone = build("per_head", head_budgets=budgets, scorer=build("keydiff")) | coded
    one = Plan(alone, LM.shape, 1, 40, 8, page_size=4)
    assert {lp.pool for lp in one.layers} == {0, 1}
    _, other = engine.prefill(LM, one, params, tokens[row : row + 1], positions[row : row + 1])
    for i in range(2):
        for x, y in zip(_entries(plan, cache, i, row), _entries(one, other, i, 0)):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    want = steps(LM, one, params, other, after[:1])[0][:, 0]
    got = steps(LM, plan, params, cache, after)[0][:, row]
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


def _entries(plan, cache, i, row):
    """(positions, k, v) of one row of layer i, sorted by head and position."""
    inv_freq = 10000.0 ** (-jnp.arange(4) / 4)
    if plan.layers[i].policy.codec.deferred:
        k, v, pos = deferred.decoded(plan, cache, i, inv_freq)
    else:
        seen = ops.view(plan, cache, i)
        ctx = ops.context(plan, i, seen.pos, inv_freq)
        (k, v), pos = plan.layers[i].policy.codec.decode(seen.store, "float32", ctx), seen.pos
    pos = np.asarray(pos[row])
    order = [np.argsort(p, kind="stable")[(p < 0).sum() :] for p in pos]
    return tuple(
        np.concatenate([np.asarray(x)[h][o] for h, o in enumerate(order)]) for x in (pos, k[row], v[row])
    )


def test_codes_of_different_structure_are_refused():
    """Groups of tokens in one layer and single tokens in another cannot share pages."""
    import kvjax.codecs.widened as widened

    kivi, int8 = P.parse("kivi(group=8)").codec, P.parse("int8").codec
    with pytest.raises(ValueError, match=r"headkv: .*share one pool.*adakv"):
        widened.widen([kivi, int8], 8, "float32", "headkv")
    shape = ModelShape(2, 4, 2, 8, (None, None), "float32", 1024)
    assert widened.widen([int8, int8], shape.head_dim, "float32", "x") == [int8, int8]
