"""Offload: the same tokens as on the device, bytes where they are said to be, and only what is missing moves."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax.policies as P
from kvjax import arrays
from kvjax.cache import placing, traffic
from kvjax.cache.plan import Plan
from kvjax.generation import engine, limits
from kvjax.generation.generator import Generator
from tests.toy import Toy, ragged, steps

LM = Toy()
LENGTHS = (150, 97, 11)
QUEST = "quest(read=12, page=4, skip_layers=0)"
STEPS = np.random.default_rng(1).integers(0, 64, (3, 12))


@functools.cache
def run(spec, reserve=16):
    plan = Plan(P.parse(spec), LM.shape, 3, 160, reserve)
    _, cache = engine.prefill(LM, plan, LM.init(), *ragged(LENGTHS, 160))
    logits, after = steps(LM, plan, LM.init(), cache, STEPS)
    return plan, cache, np.asarray(logits), after


@pytest.mark.parametrize(
    "spec",
    [
        QUEST,
        "int8",
        "quest(read=0.5, page=8, skip_layers=0) | kivi(bits=4, group=8, residual=64)",
        "snapkv(budget=48, window=4) | quest(read=12, page=4, skip_layers=0)",
    ],
)
def test_offloaded_equals_on_device_to_the_bit(spec):
    plan, cache, got, after = run(f"{spec} | offload")
    _, _, want, _ = run(spec)
    assert np.array_equal(got, want)
    assert any(lp.offloaded for lp in plan.layers)
    assert arrays.nbytes(cache) == arrays.nbytes(after) == plan.nbytes()
    in_host = sum(arrays.nbytes(p.host) for p in cache.pools if p.host is not None)
    assert in_host == plan.host_nbytes() > 0
    assert plan.device_nbytes() + plan.host_nbytes() == plan.nbytes()


@pytest.mark.parametrize(
    "spec", ["quest(read=1.0, page=4, skip_layers=0)", "quest(read=1.0, page=4, skip_layers=0) | int8"]
)
def test_what_is_fetched_before_the_token_is_stored_is_complete(spec):
    """Everything is read, so that foreseen queries choose what true ones do; new tokens begin pages of their own."""
    plan, _, got, after = run(f"{spec} | offload(ahead=True)")
    _, _, want, base = run(spec)
    assert np.array_equal(got, want)
    for i, (layer, other) in enumerate(zip(after.layers, base.layers)):
        assert np.array_equal(layer.fill, other.fill)
        table = np.asarray(layer.index["held"])
        for b, h in np.ndindex(3, 2):
            pages = -(-int(layer.fill[b, h]) // 4)
            assert sorted(table[b, h][table[b, h] >= 0]) == list(range(pages))
        for name, x in placing.whole_store(plan, after, i).items():
            held = layer.index[f"held.{name}"]
            for b, h in np.ndindex(3, 2):
                n = int(layer.fill[b, h])
                assert np.array_equal(held[b, h, :n], x[b, h, :n])


def test_the_newest_entry_is_read_though_it_was_not_stored_when_others_were_chosen():
    _, _, _, after = run("exact_topk(read=8, sink=0, recent=1, skip_layers=0) | offload(ahead=True)")
    for layer in after.layers[1:]:
        newest = np.asarray(layer.fill) - 1
        assert (np.asarray(layer.index["held"]) == newest[..., None]).any(-1).all()


def test_only_foreseen_fetches_on_a_gpu_run_beside_other_kernels(monkeypatch):
    plans = [
        Plan(P.parse(f"{QUEST}{x}"), LM.shape, 1, 160, 16)
        for x in ("", " | offload", " | offload(ahead=True)")
    ]
    assert all(engine.decoder(plan) is engine.decode for plan in plans)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert [engine.decoder(plan) for plan in plans] == [
        engine.decode,
        engine.decode,
        engine.decode_overlapping,
    ]


def test_a_foreseen_fetch_is_issued_before_the_attention_of_the_layer_before():
    """By the program's order: where a fetch's buffers are those that attention and MLP used before, it waits for them."""
    plan = Plan(P.parse(f"{QUEST} | offload(ahead=True)"), LM.shape, 1, 32, 8)
    params = jax.tree.map(jnp.asarray, LM.init())
    _, cache = engine.prefill(LM, plan, params, *ragged((32,), 32))
    token = jnp.zeros((1,), jnp.int32)
    jaxpr = jax.make_jaxpr(lambda cache: engine.step(LM, plan, params, cache, token, token >= 0))(cache)
    barriers = [e for e in flat(jaxpr.jaxpr) if e.primitive.name == "optimization_barrier"]
    assert len(barriers) == 2 * (LM.layers - 1)
    blocks = (1, LM.kv_heads, plan.table_width(1) * plan.block(1), LM.head_dim)
    for issued, arrived in zip(barriers[::2], barriers[1::2]):
        shapes = [[v.aval.shape for v in barrier.invars] for barrier in (issued, arrived)]
        assert all(
            (1, LM.q_heads, 1, LM.head_dim) in x for x in shapes
        )  # the queries that the layer attends with
        assert [x.count(blocks) for x in shapes] == [
            2,
            4,
        ]  # keys and values on their way; then those held as well


def flat(jaxpr):
    """All equations, those of inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from flat(inner)


def test_without_a_selector_every_step_moves_everything():
    plan, _, _, after = run("int8 | offload")
    slots = sum(int(layer.start.sum()) for layer in after.layers)
    assert traffic.moved_bytes(plan, after) == slots * 2 * (8 + 4) > 0  # codes and a float32 scale


def test_bytes_on_each_side():
    """2 layers, 3 rows, 2 heads of 8 float32 channels, 160 + 16 slots, read 12 of pages of 4."""
    plan = Plan(P.parse(f"{QUEST} | offload(recent=8)"), LM.shape, 3, 160, 16)
    heads, entry = 2 * 3 * 2, 2 * 8 * 4
    assert plan.host_nbytes() == heads * 160 * entry
    # The tail: 1 + 8 recent ones, the rest of their page, 16 new ones and one group, in whole pages: 32 slots.
    tail, held = heads * 32 * entry, heads * (3 * 4 * entry + 3 * 4)
    bounds, positions = heads * 176 // 4 * entry, heads * 176 * 4
    counts = heads * 4 * (3 + 1 + 2)  # fill, next slot, limit; start; entries read, blocks moved
    assert plan.device_nbytes() == tail + held + bounds + positions + counts + 4 * 3 * 4


def test_only_blocks_that_were_not_read_before_move():
    plan, cache, _, _ = run(f"{QUEST} | offload")
    held = [np.full((3, 2, 3), -1) for _ in range(2)]
    for token in STEPS.T[:6]:
        _, cache = steps(LM, plan, LM.init(), cache, token[:, None])
        moved = 0
        for i, layer in enumerate(cache.layers):
            table, start = np.asarray(layer.index["held"]), np.asarray(layer.start)
            for b, h in np.ndindex(3, 2):
                new = {n for n in table[b, h] if n >= 0 and n * 4 < start[b, h]} - set(held[i][b, h])
                assert layer.index["moved"][b, h] == len(new)
                moved += len(new)
            held[i] = table
        assert traffic.moved_bytes(plan, cache) == moved * 4 * 2 * 8 * 4
    assert 0 < moved < 3 * 2 * 2 * 3  # the last step found some of its blocks, not all


def test_held_blocks_are_the_stored_entries():
    plan, cache, _, after = run(f"{QUEST} | offload")
    for i, layer in enumerate(after.layers):
        whole = placing.whole_store(plan, after, i)
        table = np.asarray(layer.index["held"])
        for b, h in np.ndindex(3, 2):
            for place, block in enumerate(table[b, h]):
                n = min(4, int(layer.fill[b, h]) - 4 * block) if block >= 0 else 0
                for name, x in whole.items():
                    got = layer.index[f"held.{name}"][b, h, 4 * place : 4 * place + n]
                    assert np.array_equal(got, x[b, h, 4 * block : 4 * block + n])


@pytest.mark.parametrize("chunk", [None, 64])
def test_sessions_with_questions_and_chunks(chunk):
    rng = np.random.default_rng(0)
    prompts = [list(rng.integers(0, 64, n)) for n in LENGTHS]
    more = [list(rng.integers(0, 64, n)) for n in (5, 0, 9)]
    out = {}
    for spec in (QUEST, f"{QUEST} | offload"):
        session = Generator(LM, LM.init(), P.parse(spec), chunk=chunk).prefill(prompts, 32)
        session.extend(more)
        session.extend([[3], [4, 5], []], stepwise=True)
        out[spec] = [o.tokens for o in session.decode([12] * 3)]
    assert out[QUEST] == out[f"{QUEST} | offload"]
    assert session.host_cache_bytes == session.plan.prompt_only().host_nbytes() > 0
    assert session.moved_bytes > 0


def test_ahead_chooses_with_the_next_layers_projection():
    """The queries that layer 0 foresees for layer 1 are its input times layer 1's projection; layer 0 has its own."""
    lm, seen = Toy(), {}
    params = lm.init()

    def attend(x, cache):
        seen[x.layer] = (x, None if x.ahead is None else x.ahead().q)
        return jnp.zeros_like(x.q), cache

    tokens, positions = jnp.ones((1, 1), jnp.int32), jnp.full((1, 1), 7)
    lm.hidden(params, tokens, positions, None, attend)
    # Without attention's output the residual stream is the same in both layers, so foreseen and true queries agree.
    assert np.allclose(seen[0][1], seen[1][0].q, atol=1e-5) and seen[1][1] is None
    plan, _, got, after = run(f"{QUEST} | offload(ahead=True)")
    _, _, want, base = run(f"{QUEST} | offload")
    assert plan.policy.looks_ahead and after.ahead is None
    first = [{n: np.asarray(x) for n, x in c.layers[0].index.items() if n != "moved"} for c in (after, base)]
    assert all(np.array_equal(first[0][n], x) for n, x in first[1].items())  # layer 0 chooses as always
    assert not np.array_equal(got, want)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("h2o(budget=0.5) | offload", "eviction while decoding"),
        ("kvzip(budget=0.5) | offload", "does not compose"),
        ("adakv(budget=0.5) | quest(read=0.5) | offload", "Ragged"),
    ],
)
def test_what_does_not_compose_says_why(spec, words):
    with pytest.raises(ValueError, match=words):
        Plan(P.parse(spec), LM.shape, 1, 64, 8)
    with pytest.raises(ValueError, match="recent must be at least 0"):
        P.parse("quest | offload(recent=-1)")


def test_too_little_host_memory_is_told_with_the_numbers(monkeypatch):
    monkeypatch.setattr(limits, "free_host_bytes", lambda: 1000)
    with pytest.raises(MemoryError, match=r"needs [\d,]+ bytes of host memory .* 1,000 are available"):
        Generator(LM, LM.init(), P.parse(f"{QUEST} | offload")).prefill([[1] * 100], 8)


def test_a_mesh_is_refused():
    mesh = jax.make_mesh((1,), ("data",))
    Generator(LM, None, P.parse(f"{QUEST} | offload"), mesh=mesh)
    if len(jax.devices()) > 1:
        with pytest.raises(ValueError, match="one device"):
            Generator(LM, None, P.parse(f"{QUEST} | offload"), mesh=jax.make_mesh((2,), ("data",)))
