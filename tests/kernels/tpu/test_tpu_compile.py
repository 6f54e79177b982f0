"""Every TPU kernel through libtpu's compiler on four generations: memory, VMEM and declared work."""

from __future__ import annotations

import importlib.util

import pytest

from launch import aot, aot_kernels
from pallas_kernels import formats

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu is not installed (no wheel for this platform)",
    ),
    pytest.mark.xdist_group("libtpu"),
]

SIZES = aot_kernels.Sizes(batch=2, q_heads=8, kv_heads=2, context=2048, prompt=256)
VMEM = {"v5e:2x2": 128, "v5p:2x2x1": 64, "v6e:2x2": 128, "tpu7x:2x2x1": 64}  # MiB of a core


@pytest.fixture(scope="module", params=VMEM)
def rows(request):
    return request.param, {row["stage"]: row for row in aot.kernel_rows(request.param, SIZES)}


def test_every_kernel_compiles_within_vmem(rows):
    topology, by_name = rows
    assert set(by_name) == {case.name for case in aot_kernels.cases(SIZES)}
    for name, row in by_name.items():
        assert row["flops"] > 0 or name.startswith("append"), name
        if row["vmem_bytes"] is not None:
            assert 0 < row["vmem_bytes"] <= VMEM[topology] << 20, name


def test_cache_costs_in_hbm_what_its_spec_says(rows):
    """Codes, scales and zeros without hidden padding: what the format's formula gives, to one part in 100."""
    _, by_name = rows
    slots = SIZES.batch * SIZES.kv_heads * SIZES.context
    for fmt in formats.FORMATS:
        spec = slots * formats.bytes_per_slot(fmt, SIZES.head_dim)
        for layout in ("", "_paged"):
            allocated = by_name[f"decode_{fmt}{layout}"]["argument_bytes"]
            assert spec <= allocated <= 1.01 * spec + (1 << 16), (fmt, layout)


def test_appends_update_the_cache_in_place(rows):
    _, by_name = rows
    slots = SIZES.batch * SIZES.kv_heads * SIZES.context
    for name, size in (("append_bfloat16", 2), ("append_int8", 1)):
        cache = slots * SIZES.head_dim * size
        assert by_name[name]["hbm_bytes_per_device"] < 1.1 * cache, "a second cache was allocated"


def test_packed_decode_reads_its_share_of_bf16(rows):
    _, by_name = rows
    full = by_name["decode_dense"]["bytes_accessed"]
    for fmt, share in (("int4", 0.30), ("int2", 0.18)):
        # At 2048 slots queries, outputs and bounds weigh in; test_tpu_dma has the exact share at 8192.
        edge = 4 * SIZES.batch * SIZES.kv_heads * 8 * 128 * 16
        assert by_name[f"decode_{fmt}"]["bytes_accessed"] <= share * full + edge, fmt


def test_unknown_topology_is_one_line():
    with pytest.raises(ValueError, match=r"--topology='v9z:2x2': .*examples: v5e:2x4"):
        aot.devices_of("v9z:2x2")
