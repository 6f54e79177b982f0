"""Check the GPU decode kernel on a Hopper GPU against a float64 loop: `python tools/device_decode.py [words]`.

With words, only the problems whose name has all of them.
Fresh random inputs every run; NaN in every slot, page and scale that is not valid. Prints relative L2 errors of the
output and of the slots' mass, and the largest error of the log-sum-exp. `launch.bench` measures the speed.
"""

import functools
import os
import pathlib
import sys
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

BF16 = jnp.bfloat16


def error(got, want):
    """Relative L2 error, NaN if anything is not finite."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if not np.isfinite(got).all():
        return float("nan")
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


def check_one(name, *, q_positions=None, mask=None, positions=None, window=None, softcap=None, block_size=None,
              blocks=None, seed=None, **make):  # fmt: skip
    """One problem, as `decode_oracle.make` takes it; prints one line."""
    if not all(word in name for word in sys.argv[1:]):
        return
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
            kept[..., kept.shape[2] - problem.store.residual :] = True
            valid = valid & kept
        seen = oracle.visibility(total, positions, q_positions, mask, window, tokens, valid, order)
        want = oracle.attention(problem.q, problem.k, problem.v, seen, dim**-0.5, softcap)
        arrays = dict(
            positions=positions, q_positions=q_positions, mask=mask, table=problem.table, blocks=blocks
        )
        arrays = {n: jnp.asarray(a) for n, a in arrays.items() if a is not None}
        mass_per = rng.choice(["query", "kv_head"])
        # Smaller blocks are read as pages, whose order is lost.
        weighs = block_size is None or block_size >= 64
        f = jax.jit(functools.partial(decode_attention, scale=dim**-0.5, window=window, softcap=softcap,
                                      block_size=block_size, return_lse=True, return_mass=weighs, mass_per=mass_per,
                                      implementation="mosaic_gpu"))  # fmt: skip
        got = f(problem.q, problem.store, lengths=jnp.asarray(problem.lengths), **arrays)
        some = np.isfinite(want[1])
        same = (np.isinf(np.asarray(got.lse)) == ~some).all()
        lse = float(np.abs(np.asarray(got.lse) - want[1])[some].max()) if some.any() else 0.0
        e, of_mass = error(got.out, want[0]), 0.0
        if weighs:
            mass = want[2]
            if mass_per == "kv_head":
                mass = mass.reshape(*problem.lengths.shape, -1, mass.shape[-1]).sum(2)
            same &= (np.asarray(got.mass)[mass == 0] == 0).all()
            of_mass = error(got.mass, mass)
        bad = "" if e < 1e-2 and same and lse < 3e-2 and of_mass < 1e-2 else "  <-- BAD"
        print(f"{name:48s} out {e:.1e} lse {lse:.1e} mass {of_mass:.1e}{bad}", flush=True)
    except Exception as ex:
        print(f"{name:44s} FAILED {type(ex).__name__}: {str(ex)[:400]}", flush=True)


def checks():
    """Every format, layout and option."""
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
    check_one(
        "int8 5 tokens group 3",
        fmt="int8",
        group=3,
        tokens=5,
        q_positions="last",
        lengths=[[512, 400], [40, 64]],
    )
    for fmt in ("dense", "int8", "int4"):
        check_one(
            f"{fmt} window",
            fmt=fmt,
            q_positions="last",
            window=130,
            slots=1024,
            lengths=[[1024, 1023], [700, 699]],
        )
    check_one("dense window softcap", tokens=3, q_positions="last", window=70, softcap=5.0,
              lengths=[[512, 512], [400, 400]])  # fmt: skip
    check_one("dense 1000 slots", slots=1000, lengths=[[1000, 999], [65, 500]])
    check_one("dense 1032 slots, window", slots=1032, tokens=2, q_positions="last", window=300, lengths=[[1032, 999], [600, 700]])  # fmt: skip
    check_one("dense pages of 8", page=8, slots=1000)
    lengths = [[512, 400], [40, 64], [99, 16]]
    check_one(
        "dense 16 tokens, group 3, 3 rows", batch=3, group=3, tokens=16, q_positions="last", lengths=lengths
    )
    for fmt in ("int8", "fp8_e5m2"):
        check_one(f"{fmt} 16 tokens", fmt=fmt, tokens=16, q_positions="last", lengths=[[512, 400], [40, 64]])
        check_one(f"{fmt} f16 queries", fmt=fmt, dtype=jnp.float16, slots=1024)
    for fmt in ("int4", "int2"):
        check_one(f"{fmt} 4 tokens", fmt=fmt, tokens=4, q_positions="last", lengths=[[512, 400], [40, 64]])
        check_one(f"{fmt} group 3", fmt=fmt, group=3, slots=4096, lengths=[[4096, 4000], [1, 2049]])
        check_one(f"{fmt} dim 256, pages of 256", fmt=fmt, dim=256, page=256, q_positions="last",
                  lengths=[[512, 400], [40, 64]])  # fmt: skip
    for fmt in ("int4", "int2"):
        packed = dict(fmt=fmt, kv_group=32)
        check_one(f"{fmt} group 32", **packed, lengths=[[512, 511], [33, 0]])
        check_one(f"{fmt} group 32, pages of 128, residual", **packed, page=128, residual=128)
        check_one(f"{fmt} group 32, 16 queries a head", **packed, group=16)
        check_one(f"{fmt} group 32, 5 queries a head", **packed, group=5, residual=8)
        check_one(f"{fmt} group 32, 1 query a head", **packed, group=1, residual=20)
        check_one(f"{fmt} group 32, dim 256", **packed, dim=256, group=2, residual=70)
        check_one(
            f"{fmt} group 32, 3 tokens, window",
            **packed,
            tokens=3,
            residual=40,
            q_positions="last",
            window=90,
        )
        check_one(
            f"{fmt} group 32, 8192 slots, softcap",
            **packed,
            slots=8192,
            lengths=8000,
            residual=33,
            softcap=5.0,
        )
        check_one(f"{fmt} group 128, 6 queries a head", fmt=fmt, kv_group=128, group=6, residual=64)
    positions = np.sort(rng.choice(60_000, (2, 2, 512)), -1).astype(np.int32)
    positions[:, :, ::7] = -1
    q_positions = np.sort(rng.choice(60_000, (2, 4)), -1).astype(np.int32)
    check_one("dense positions", tokens=4, positions=positions, q_positions=q_positions, lengths=300)
    mask = np.tril(rng.random((2, 4, 4)) < 0.5) | np.eye(4, dtype=bool)
    check_one("dense tree", tokens=4, mask=mask, lengths=[[300, 512], [64, 65]])
    check_one("int4 tree positions", fmt="int4", tokens=4, mask=mask, positions=positions, q_positions=q_positions,
              lengths=[[300, 512], [64, 65]])  # fmt: skip
    both = np.concatenate([positions, rng.integers(-1, 60_000, (2, 2, 24)).astype(np.int32)], -1)
    for fmt in ("dense", "int8", "int2"):
        args = dict(fmt=fmt, kv_group=32, tokens=4, residual=24, lengths=[[300, 512], [64, 65]])
        check_one(f"{fmt} residual, positions", **args, positions=both, q_positions=q_positions)
        check_one(f"{fmt} residual, tree", **args, mask=mask)
    blocks = np.array([[[3, 0, 7], [1, -1, -1]], [[7, 6, 5], [0, 2, -1]]], np.int32)
    for fmt in ("dense", "int8", "int4"):
        check_one(f"{fmt} blocks of 64, residual", fmt=fmt, blocks=blocks, block_size=64, lengths=full, residual=9,
                  kv_group=32)  # fmt: skip
        check_one(f"{fmt} blocks of 64", fmt=fmt, blocks=blocks, block_size=64, lengths=full)
        check_one(
            f"{fmt} blocks of 64, pages of 128", fmt=fmt, blocks=blocks, block_size=64, page=128, lengths=full
        )

    for size in (8, 16, 32):
        small = np.stack([[rng.permutation(512 // size)[:20] for _ in range(2)] for _ in range(2)]).astype(
            np.int32
        )
        small[0, 1, 7:] = -1
        lengths = [[512, 397], [3, 130]]
        check_one(f"dense blocks of {size}", fmt="dense", blocks=small, block_size=size, lengths=lengths)

    def sink(q, slots):
        k, v = rng.standard_normal((2, 2, 2, slots, q.shape[-1])).astype(np.float32)
        for h in range(2):
            k[:, h, 3] = 2.2 * q[:, 4 * h : 4 * h + 4, 0].mean(1)
        v *= 10.0 ** rng.uniform(-3, 2, (2, 2, slots, 1)).astype(np.float32)
        return k, v

    for fmt in formats.FORMATS:
        check_one(f"{fmt} sink, values of all sizes", fmt=fmt, make_kv=sink, slots=2048, lengths=2000)
        check_one(f"{fmt} all equal", fmt=fmt, make_kv=lambda q, n: np.ones((2, 2, 2, n, 128), np.float32))


if __name__ == "__main__":
    print(jax.devices()[0].device_kind, jax.__version__, flush=True)
    started = time.time()
    checks()
    print("seconds", round(time.time() - started), flush=True)
