"""Check and time the GPU decode kernel on a real device: `python3 tools/device_decode.py [check] [time] [sweep]`."""

import functools
import glob
import os
import pathlib
import sys
import tempfile
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/kernels/decode")]

import decode_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import formats
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_attention.gpu import decode_attention_gpu

BF16 = jnp.bfloat16
NONE = dict(positions=None, q_positions=None, mask=None, scale=128**-0.5, window=None, softcap=None, table=None,
            blocks=None, block_size=None, return_mass=False)  # fmt: skip


def error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if not np.isfinite(got).all():
        return float("nan")
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


def check_one(name, *, q_positions=None, mask=None, positions=None, window=None, softcap=None, block_size=None,
              blocks=None, seed=None, **make):  # fmt: skip
    rng = np.random.default_rng(seed)
    make = dict(dim=128, dtype=BF16, group=4, kv_group=64, slots=512) | make
    try:
        problem = oracle.make(rng, **make)
        tokens, dim = problem.q.shape[2:]
        valid, order, total = oracle.entries(problem)
        if isinstance(q_positions, str):
            q_positions = (total.min(1)[:, None] - tokens + np.arange(tokens)).astype(np.int32)
        if blocks is not None:
            kept = np.zeros(valid.shape, bool)
            for b, h, i in np.ndindex(blocks.shape):
                if blocks[b, h, i] >= 0:
                    kept[b, h, blocks[b, h, i] * block_size :][:block_size] = True
            valid = valid & kept
        seen = oracle.visibility(total, positions, q_positions, mask, window, tokens, valid, order)
        want = oracle.attention(problem.q, problem.k, problem.v, seen, dim**-0.5, softcap)
        arrays = dict(positions=positions, q_positions=q_positions, mask=mask, table=problem.table, blocks=blocks)
        arrays = {n: jnp.asarray(a) for n, a in arrays.items() if a is not None}
        f = jax.jit(functools.partial(decode_attention, scale=dim**-0.5, window=window, softcap=softcap,
                                      block_size=block_size, return_lse=True, return_mass=True,
                                      implementation="mosaic_gpu"))  # fmt: skip
        got = f(problem.q, problem.store, lengths=jnp.asarray(problem.lengths), **arrays)
        some = np.isfinite(want[1])
        same = (np.isinf(np.asarray(got.lse)) == ~some).all()
        lse = float(np.abs(np.asarray(got.lse) - want[1])[some].max()) if some.any() else 0.0
        e = error(got.out, want[0])
        bad = "" if e < 1e-2 and same and lse < 3e-2 and error(got.mass, want[2]) < 1e-2 else "  <-- BAD"
        print(f"{name:44s} out {e:.1e} lse {lse:.1e} mass {error(got.mass, want[2]):.1e}{bad}", flush=True)
    except Exception as ex:
        print(f"{name:44s} FAILED {type(ex).__name__}: {str(ex)[:400]}", flush=True)


def checks():
    rng = np.random.default_rng()
    full = [[512, 512], [512, 512]]
    for fmt in formats.FORMATS:
        check_one(f"{fmt} full", fmt=fmt, lengths=full)
        check_one(f"{fmt} ragged lengths", fmt=fmt, lengths=[[511, 130], [0, 1]])
        check_one(f"{fmt} pages of 128", fmt=fmt, page=128, lengths=[[511, 130], [0, 1]])
        check_one(f"{fmt} 2 tokens, residual", fmt=fmt, tokens=2, residual=32, q_positions="last")
        check_one(f"{fmt} group 1", fmt=fmt, group=1)
        check_one(f"{fmt} group 16", fmt=fmt, group=16)
        check_one(f"{fmt} dim 256", fmt=fmt, dim=256)
    for page in (16, 64, 256):
        check_one(f"dense pages of {page}", page=page)
    check_one("int8 bf16 scales pages 64", fmt="int8", page=64, meta=BF16)
    check_one("int4 bf16 scales group 128", fmt="int4", meta=BF16, kv_group=128)
    check_one("int2 group 128", fmt="int2", kv_group=128)
    check_one("dense f16", dtype=jnp.float16)
    check_one("dense dim 64", dim=64)
    check_one("dense dim 192", dim=192)
    check_one("dense 16 tokens", tokens=16, q_positions="last", lengths=[[512, 400], [40, 64]])
    check_one("int8 5 tokens group 3", fmt="int8", group=3, tokens=5, q_positions="last", lengths=[[512, 400], [40, 64]])
    check_one("dense window softcap", tokens=3, q_positions="last", window=70, softcap=5.0,
              lengths=[[512, 512], [400, 400]])  # fmt: skip
    positions = np.sort(rng.choice(60_000, (2, 2, 512)), -1).astype(np.int32)
    positions[:, :, ::7] = -1
    q_positions = np.sort(rng.choice(60_000, (2, 4)), -1).astype(np.int32)
    check_one("dense positions", tokens=4, positions=positions, q_positions=q_positions, lengths=300)
    mask = np.tril(rng.random((2, 4, 4)) < 0.5) | np.eye(4, dtype=bool)
    check_one("dense tree", tokens=4, mask=mask, lengths=[[300, 512], [64, 65]])
    check_one("int4 tree positions", fmt="int4", tokens=4, mask=mask, positions=positions, q_positions=q_positions,
              lengths=[[300, 512], [64, 65]])  # fmt: skip
    blocks = np.array([[[3, 0, 7], [1, -1, -1]], [[7, 6, 5], [0, 2, -1]]], np.int32)
    for fmt in ("dense", "int8", "int4"):
        check_one(f"{fmt} blocks of 64", fmt=fmt, blocks=blocks, block_size=64, lengths=full)
        check_one(f"{fmt} blocks of 64, pages of 128", fmt=fmt, blocks=blocks, block_size=64, page=128, lengths=full)

    def sink(q, slots):
        k, v = rng.standard_normal((2, 2, 2, slots, q.shape[-1])).astype(np.float32)
        for h in range(2):
            k[:, h, 3] = 2.2 * q[:, 4 * h : 4 * h + 4, 0].mean(1)
        v *= 10.0 ** rng.uniform(-3, 2, (2, 2, slots, 1)).astype(np.float32)
        return k, v

    for fmt in formats.FORMATS:
        check_one(f"{fmt} sink, values of all sizes", fmt=fmt, make_kv=sink, slots=2048, lengths=2000)
        check_one(f"{fmt} all equal", fmt=fmt, make_kv=lambda q, n: np.ones((2, 2, 2, n, 128), np.float32))


def profile(f, *args, n=10):
    """Median device microseconds per kernel name and call, from the profiler."""
    with tempfile.TemporaryDirectory() as where:
        with jax.profiler.trace(where):
            for _ in range(n):
                out = f(*args)
            jax.block_until_ready(out)
        path = glob.glob(f"{where}/**/*.xplane.pb", recursive=True)[0]
        data = jax.profiler.ProfileData.from_file(path)
        times = {}
        for plane in data.planes:
            if "GPU" not in plane.name:
                continue
            for line in plane.lines:
                if "Stream" not in line.name:
                    continue
                for event in line.events:
                    times.setdefault(event.name, []).append(event.duration_ns / 1e3)
    return {k: (float(np.median(v)), len(v) / n) for k, v in times.items()}


def wall(f, *args, n=20):
    jax.block_until_ready(f(*args))
    start = time.perf_counter()
    for _ in range(n):
        out = f(*args)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / n * 1e6


SHAPES = {"A": (32, 8192), "B": (8, 32768), "C": (1, 32768), "D": (1, 131072), "E": (64, 4096), "F": (8, 131072)}


@functools.cache
def raw_inputs(shape):
    b, s = SHAPES[shape]
    ks = jax.random.split(jax.random.key(time.time_ns() % 2**31), 3)
    make = jax.jit(lambda key: jax.random.normal(key, (b, 8, s, 128), BF16))
    return jax.random.normal(ks[0], (b, 32, 1, 128), BF16), make(ks[1]), make(ks[2])


@functools.lru_cache(maxsize=2)
def inputs(shape, fmt, page, meta=None):
    b, s = SHAPES[shape]
    q, k, v = raw_inputs(shape)
    parts = [jax.jit(lambda k, v: formats.encode(k, v, fmt, group=64, meta_dtype=meta))(k[i : i + 1], v[i : i + 1]) for i in range(b)]
    store = jax.tree.map(lambda *x: jnp.concatenate(x), *parts) if fmt != "dense" else formats.KVStore(k, v)
    table = None
    if page:
        rng = np.random.default_rng()
        n = b * 8 * s // page
        place = rng.permutation(n).astype(np.int32)
        fields = {}
        for name, (axis, per) in store.slot_fields().items():
            x = getattr(store, name)
            at = x.ndim + axis
            x = x.reshape(*x.shape[:at], s // page, page // per, *x.shape[at + 1 :])
            x = jnp.moveaxis(x, at, 2)
            x = x.reshape(n, *x.shape[3:])
            fields[name] = jnp.zeros_like(x).at[place].set(x)
        store = formats.dataclasses.replace(store, **fields)
        table = jnp.asarray(place.reshape(b, 8, s // page))
    lengths = jnp.full((b, 8), s, jnp.int32)
    return q, store, lengths, table


def time_one(shape, fmt, page=None, chained=False, want=None, profiled=True, meta=None, fraction=1.0,
             blocks=None, return_mass=False, **setting):  # fmt: skip
    name = f"{shape} {fmt}{'' if page is None else f' page {page}'} {setting or ''}"
    name += f"{'' if meta is None else ' bf16 scales'}{'' if fraction == 1 else f' {fraction} kept'}"
    name += f"{'' if blocks is None else f' blocks {blocks}'}{' mass' if return_mass else ''}"
    try:
        q, store, lengths, table = inputs(shape, fmt, page, meta)
        nbytes = sum(x.nbytes for x in jax.tree.leaves(store)) * fraction
        lengths = (lengths * fraction).astype(jnp.int32)
        extra = dict(return_mass=return_mass)
        if blocks is not None:
            share, size = blocks
            b, s = SHAPES[shape]
            rng = np.random.default_rng()
            chosen = [np.sort(rng.permutation(s // size)[: int(share * s / size)]) for _ in range(b * 8)]
            extra |= dict(blocks=jnp.asarray(np.array(chosen, np.int32).reshape(b, 8, -1)), block_size=size)
            nbytes *= share
        kw = NONE | dict(scale=128**-0.5) | extra

        def f(q, store, lengths, table):
            got = decode_attention_gpu(q, store, **(kw | dict(lengths=lengths, table=table)), **setting)
            return (got[0], got[2]) if return_mass else got[0]

        g = jax.jit(f)
        out = g(q, store, lengths, table)
        out = out[0] if return_mass else out
        e = float("nan") if want is None else error(out[: len(want)], want)
        total = wall(g, q, store, lengths, table)
        kernel = rest = 0.0
        names = {}
        if profiled:
            names = profile(g, q, store, lengths, table)
            for k, (us, calls) in names.items():
                if "decode_attention" in k or "mosaic" in k.lower():
                    kernel += us * calls
                else:
                    rest += us * calls
        chain = 0.0
        if chained:
            n = 20

            def loop(q, store, lengths, table):
                def one(_, c):
                    return c + f((q + c * 0).astype(q.dtype), store, lengths, table) * 1e-3

                return jax.lax.fori_loop(0, n, one, jnp.zeros(q.shape, jnp.float32))

            chain = wall(jax.jit(loop), q, store, lengths, table, n=3) / n
            if chained == "profile":
                for k, v in profile(jax.jit(loop), q, store, lengths, table, n=1).items():
                    print("      chained:", k[:70], v)
        gbs = nbytes / kernel / 1e3 if kernel else 0
        print(f"{name:64s} kernel {kernel:7.1f} us {gbs:6.0f} GB/s  rest {rest:5.1f} wall {total:7.1f} "
              f"chained {chain:7.1f} err {e:.1e}", flush=True)  # fmt: skip
        return names
    except Exception as ex:
        print(f"{name:64s} FAILED {type(ex).__name__}: {str(ex)[:300]}", flush=True)


@functools.cache
def reference(shape, fmt="dense"):
    """The first row's output, from the stored keys and values in float32."""
    q, store, lengths, _ = inputs(shape, fmt, None)
    k, v = jax.jit(formats.decode)(jax.tree.map(lambda x: x[:1], store))
    f = functools.partial(decode_attention, scale=128**-0.5, implementation="xla", return_lse=True)
    one = jax.jit(lambda q, k, v, n: f(q, formats.KVStore(k, v), lengths=n).out)
    return np.asarray(one(q[:1].astype(jnp.float32), k, v, lengths[:1]))


def gaps(f, *args):
    """Busy time, span and the largest gaps on the stream of one call."""
    with tempfile.TemporaryDirectory() as where:
        with jax.profiler.trace(where):
            jax.block_until_ready(f(*args))
        data = jax.profiler.ProfileData.from_file(glob.glob(f"{where}/**/*.xplane.pb", recursive=True)[0])
        events = [(e.start_ns, e.end_ns, e.name) for p in data.planes if "GPU" in p.name for line in p.lines
                  if "Stream" in line.name for e in line.events]  # fmt: skip
    events.sort()
    span = (events[-1][1] - events[0][0]) / 1e3
    busy = sum(e[1] - e[0] for e in events) / 1e3
    between = [((y[0] - x[1]) / 1e3, x[2][:32], y[2][:32]) for x, y in zip(events, events[1:])]
    print(f"   span {span:.0f} us busy {busy:.0f} events {len(events)}")
    for line in between[len(between) // 2 : len(between) // 2 + 6]:
        print("   gap %.1f us after %s before %s" % line)
    print("   largest gaps", sorted(between)[-3:])


def ablate():
    """Where a packed step's time goes: leave one part out (wrong results) and time the rest."""
    from pallas_kernels import ptx
    from pallas_kernels.decode_attention import gpu_step

    wgmma, fence, scale = ptx.wgmma, ptx.fence_async, gpu_step.scale_queries
    any_, values, keys = ptx.barrier_any, gpu_step._value_fragments, gpu_step._key_fragments

    def no_product(which):
        def f(acc, a, b, **kw):
            if kw["init"] == (which == "qk") or which == "all":
                used = [r for x in a if not isinstance(x, int) for r in x]
                for r in used:
                    ptx.asm("// keep $0", "", [r])
                n = kw["n"] // 2
                return [[ptx.f32(0.0)] * n for _ in acc] if kw["init"] else acc
            return wgmma(acc, a, b, **kw)

        return f

    def short(acc, a, b, **kw):
        per, count = len(a) // len(acc), len(acc)
        keep = [t * per + s for t in range(count) for s in range(per // 2)]
        return wgmma(acc, [a[i] for i in keep], [b[i] for i in keep], **kw)

    variants = {
        "all": {},
        "no qk product": {(ptx, "wgmma"): no_product("qk")},
        "no pv product": {(ptx, "wgmma"): no_product("pv")},
        "no products": {(ptx, "wgmma"): no_product("all")},
        "half of the products": {(ptx, "wgmma"): short},
        "no fence": {(ptx, "fence_async"): lambda: None},
        "no query scaling": {(gpu_step, "scale_queries"): lambda plan: lambda ctx, *a: None},
        "no reduction in barrier": {(ptx, "barrier_any"): lambda bit: (ptx.barrier(), ptx.i32(0).equals(1))[1]},
        "no value unpacking": {(gpu_step, "_value_fragments"): lambda plan, t, v, steps: [
            [[ptx.i32(1)] * 4 for _ in steps] for _ in range(2)]},
        "no key unpacking": {(gpu_step, "_key_fragments"): lambda plan, t, k: [
            [[ptx.i32(1)] * 4 for _ in range(8)] for _ in range(plan.tiles)]},
    }
    for fmt in ("int4", "int2"):
        for name, patch in variants.items():
            saved = {(m, n): getattr(m, n) for m, n in patch}
            for (m, n), f in patch.items():
                setattr(m, n, f)
            print(f"{name:26s}", end=" ")
            time_one("A", fmt, splits=2, stages=4)
            for (m, n), f in saved.items():
                setattr(m, n, f)


def packed():
    t = time_one
    for shape in ("A",):
        t(shape, "dense", want=reference(shape))
        t(shape, "int8", want=reference(shape, "int8"))
        t(shape, "fp8_e4m3", want=reference(shape, "fp8_e4m3"))
        for fmt, options in (("int4", [(2, 4), (1, 4), (1, 2)]), ("int2", [(2, 8), (1, 8), (1, 4), (1, 2)])):
            want = reference(shape, fmt)
            for parts in options:
                for splits, stages in ((2, 3), (2, 4), (4, 3), (4, 4), (8, 3)):
                    t(shape, fmt, want=want, parts=parts, splits=splits, stages=stages)
                    want = None


def more():
    t = time_one
    t("A", "dense", want=reference("A"))
    t("A", "dense", return_mass=True)
    for page in (16, 64, 128):
        t("A", "dense", page=page, want=reference("A"))
    for fmt in ("int8", "int4"):
        t("A", fmt, want=reference("A", fmt))
        t("A", fmt, page=128, want=reference("A", fmt))
    for fmt in ("int8", "fp8_e4m3", "int4"):
        t("A", fmt, meta=BF16)
    raw_inputs.cache_clear(), inputs.cache_clear(), reference.cache_clear()
    for fmt in ("dense", "int8", "fp8_e4m3", "fp8_e5m2", "int4", "int2"):
        t("B", fmt)
    t("B", "dense", page=64)
    t("B", "dense", page=64, fraction=0.2)
    t("B", "dense", page=16, fraction=0.2)
    t("B", "dense", fraction=0.2)
    raw_inputs.cache_clear(), inputs.cache_clear(), reference.cache_clear()
    t("F", "dense")
    for size in (64, 128):
        t("F", "dense", blocks=(0.1, size))


if __name__ == "__main__":
    print(jax.devices(), jax.__version__, flush=True)
    t0 = time.time()
    for what in sys.argv[1:] or ["check"]:
        globals()[{"check": "checks"}.get(what, what)]()
        print("seconds", round(time.time() - t0), flush=True)
