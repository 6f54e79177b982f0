"""`launch.estimate`: bytes against formulas and against real caches, times against recorded measurements."""

from __future__ import annotations

import dataclasses
import json

import pytest

from kvjax.cache import traffic
from kvjax.cache.plan import Plan
from kvjax.generation import engine
from kvjax.policies import parse
from launch import cli, estimate
from launch.cost_model import DEVICES, Device, largest, step_traffic, weights
from launch.cost_model import estimate as cost
from models import params, zoo
from tests.toy import Toy, ragged

LLAMA = zoo.SHAPES["llama3-8b"]
H200 = DEVICES["h200"]


def row(policy="full", batch=8, context=32768, device=H200, config=LLAMA, **kwargs):
    return cost(config, parse(policy), device, batch=batch, context=context, **kwargs)


def test_bytes_of_a_known_shape():
    """Llama 3.1 8B: 8,030,261,248 parameters; a token's keys and values take 2 * 32 * 8 * 128 * 2 bytes."""
    got = row()
    assert got["weight_bytes"] == 2 * 8_030_261_248
    assert got["read_bytes"]["cache"] == 8 * 32768 * 131072
    embedding = 128256 * 4096 * 2
    assert got["read_bytes"]["weights"] == got["weight_bytes"] - embedding + 8 * 4096 * 2
    assert got["read_bytes"]["index"] == 0 and got["read_fraction"] == 1.0
    # Beside keys and values: positions (int32 per slot and head); fill, next slot and limit per head; four row counters.
    more = 32 * 8 * 8 * (32768 * 4 + 12) + 4 * 8 * 4
    assert got["cache_bytes"] == 8 * 32768 * 131072 + more
    assert got["allocated_bytes"] == got["cache_bytes"] + 8 * 128 * (131072 + 32 * 8 * 4)


def test_a_selector_reads_pages_and_their_bounds():
    got = row("quest(read=0.125, page=16, skip_layers=2)")
    slot, full = 2 * 128 * 2, 8 * 8 * 32768
    assert got["read_bytes"]["cache"] == slot * full * (2 + 30 / 8)
    assert got["read_bytes"]["index"] == 30 * full * slot / 16
    assert got["read_fraction"] == pytest.approx((2 + 30 * (1 / 8 + 1 / 16)) / 32)


@pytest.mark.parametrize("policy", ["full", "quest(read=16, page=8, skip_layers=1)", "int8"])
def test_counts_what_a_real_cache_counts(policy):
    lm = Toy()
    plan = Plan(parse(policy), lm.shape, 2, 64, 0)
    _, cache = engine.prefill(lm, plan, lm.init(), *ragged((64, 64), 64))
    moved = step_traffic(plan)
    assert moved.cache + moved.index == pytest.approx(traffic.read_bytes(plan, cache))


@pytest.mark.parametrize(
    ("policy", "batch", "context", "us"),
    # docs/results_decode_attention.md: kernel time of one layer, bf16 and 8-bit codes.
    [
        ("full", 1, 131072 - 128, 120.9),
        ("full", 8, 32768, 238.9),
        ("full", 32, 8192, 239.5),
        ("int8", 8, 32768, 127.6),
    ],
)
def test_attention_time_agrees_with_the_recorded_one(policy, batch, context, us):
    got = row(policy, batch, context)["attention_s"] / 32 * 1e6
    assert got == pytest.approx(us, rel=0.03)
    assert (
        row(policy, batch, context, dataclasses.replace(H200, bandwidth=1e12))["attention_s"]
        > 4 * got * 32e-6
    )


@pytest.mark.parametrize(
    ("policy", "ms", "below"),
    [("full", 35.1, 0.05), ("int8", 20.9, 0.10), ("snapkv(budget=0.2)", 11.1, 0.16)],
)
def test_a_step_is_a_floor_of_the_measured_one(policy, ms, below):
    """docs/results.md: a decode step of 32 layers at 32 x 32,768, end to end; small launches are not in the estimate."""
    got = row(policy, 32, 32768)["step_s"] * 1e3
    assert ms * (1 - below) <= got <= ms


def test_costs_grow_with_rows_and_tokens_and_shrink_with_bits():
    steps = [row(batch=b)["step_s"] for b in (1, 2, 8, 64)]
    assert steps == sorted(steps) and steps[0] < steps[-1]
    assert row(context=65536)["step_s"] > row(context=32768)["step_s"]
    assert row(context=65536)["prefill_s"] > 2 * row(context=32768)["prefill_s"]
    fits = [row(p)["largest_batch"] for p in ("full", "int8", "kivi(bits=4)", "kivi(bits=2)")]
    assert fits == sorted(fits) and fits[0] < fits[-1]


def test_prefill_counts_two_operations_per_product():
    """One token: twice the weights of the matrix products, norms and the embedding excluded, and one pair attended."""
    got = row(batch=1, context=1)["prefill_flops"]
    norms = 4096 * (2 * 32 + 1)
    assert got == 2 * (8_030_261_248 - 128256 * 4096 - norms) + 4 * 32 * 32 * 128


def test_what_fits_fits_and_one_more_does_not():
    policy, device = parse("int8"), Device("small", 1e12, 1e14, 1e10, 20 * 2**30)
    got = row("int8", 2, 4096, device)
    room = 0.9 * 20 * 2**30 - got["weight_bytes"]

    def size(batch, context):
        return Plan(policy, LLAMA.shape(), batch, context, 128).nbytes()

    n, longest = got["largest_batch"], got["largest_context"]
    assert size(n, 4096) <= room < size(n + 1, 4096)
    assert size(2, longest) <= room < size(2, longest + 1)
    assert row(device=dataclasses.replace(device, memory=2**30))["largest_batch"] == 0


def test_largest():
    assert [largest(lambda n, m=m: n <= m, 100) for m in (0, 1, 2, 63, 64, 99, 100, 500)] == [
        0,
        1,
        2,
        63,
        64,
        99,
        100,
        100,
    ]


def test_experts_are_read_as_often_as_rows_choose_them():
    config = zoo.tiny("qwen3_moe")
    w = weights(config, "float32")
    experts = 2 * 4 * 3 * 32 * 24 * 4  # layers, experts, matrices, sizes, bytes
    head = 0 if config.tied else 96 * 32 * 4
    for rows, share in ((1, 0.5), (2, 0.75)):
        assert w.read(rows) == pytest.approx(
            w.total - experts * (1 - share) - (head and head - rows * 32 * 4)
        )
    tree = params.declare(config)
    assert tree.layers[0].mlp.gate.shape == (4, 32, 24)


def test_command_writes_json(tmp_path, capsys):
    out = tmp_path / "deep" / "row.json"
    argv = [
        "--model=kvref-22m",
        "--policy=int8",
        "--context=4096",
        "--device=v5e",
        "--bandwidth_gb_s=500",
        "--json",
    ]
    assert cli.run(estimate.define, estimate.main, [*argv, f"--out={out}"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed == json.loads(out.read_text()) and printed["model"] == "kvref-22m"
    read = sum(printed["read_bytes"].values())
    assert printed["read_bytes"]["host"] == printed["transfer_s"] == 0
    assert printed["step_s"] == pytest.approx(read / 500e9)


def test_offload_moves_what_it_reads_over_the_link():
    """Quest with 1,024 entries in 32 layers of 8 rows and 8 heads: 2 * 128 * 2 bytes each; ShadowKV moves values only."""
    spec = "quest(read=1024, page=16, skip_layers=0)"
    near, far = row(spec), row(f"{spec} | offload")
    shadow = row("shadowkv(read=1024)")
    moved = 32 * 8 * 8 * 1024 * 512
    assert far["read_bytes"]["host"] == moved and shadow["read_bytes"]["host"] == moved / 2
    assert far["transfer_s"] == pytest.approx(moved / H200.host_link)
    assert far["step_s"] == pytest.approx(near["step_s"] + far["transfer_s"])
    assert far["host_cache_bytes"] == 32 * 8 * 8 * 32768 * 512
    assert far["largest_batch"] > 5 * near["largest_batch"]
    disk = row(f"{spec} | offload(disk='/nowhere', memory=0)")  # pages of 16 slots and 4 bytes of checksum
    assert disk["disk_cache_bytes"] == 32 * 8 * 8 * (32768 * 512 + 2048 * 4)
    assert disk["host_cache_bytes"] == 0 and disk["read_bytes"]["host"] == moved


@pytest.mark.parametrize(
    ("flag", "names"),
    [
        ("--model=nowhere", "llama3-8b"),
        ("--policy=qest", "quest"),
        ("--device=h900", "h200"),
        ("--context=200000", "131072"),
        ("--batch=0", "batch"),
    ],
)
def test_mistakes_are_told_in_one_line(flag, names, capsys):
    assert cli.run(estimate.define, estimate.main, [flag]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error:") and names in error and error.count("\n") == 1
