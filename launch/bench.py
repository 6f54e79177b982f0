"""Measure kernels and generation on this machine, own implementations beside the peers that are installed.

Suites: decode_attention, prefill_attention, observation (kernels), selection (one layer's step), sparse_prefill,
shared_prefix (one layer's attention), generate, policies, codecs, retrieval (whole steps). A CPU runs small sizes through
XLA. Rows: name, shape, dtype, implementation, us, gb_per_s, tflop_per_s, fraction_of_copy, where the copy is a large
device-to-device copy measured in the same process, bytes read plus bytes written.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from absl import flags
from tqdm import tqdm

from launch import cli

Row = dict[str, Any]

SUITES = {
    "decode_attention": "decode",
    "prefill_attention": "prefill",
    "observation": "observation",
    "generate": "generate",
    "policies": "policies",
    "codecs": "codecs",
    "selection": "selection",
    "retrieval": "retrieval",
    "sparse_prefill": "sparse_prefill",
    "shared_prefix": "shared_prefix",
}
_COLUMNS = (
    "name", "shape", "dtype", "implementation", "us", "gb_per_s", "tflop_per_s", "fraction_of_copy",
)  # fmt: skip


def define(f: flags.FlagValues) -> None:
    """Flags of this command."""
    flags.DEFINE_enum("suite", None, available(), "what to measure", flag_values=f)
    flags.DEFINE_string("out", None, "write the rows to this JSON file", flag_values=f)
    flags.mark_flag_as_required("suite", flag_values=f)


def available() -> list[str]:
    """Suites whose module is installed."""
    return [
        name for name, module in SUITES.items() if importlib.util.find_spec(f"launch.bench_suites.{module}")
    ]


def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of a large copy on the device (a small one on a CPU)."""
    from launch.bench_suites import timing

    size = 1 << 26 if jax.default_backend() == "cpu" else 1 << 31
    source = jnp.arange(size // 4, dtype=jnp.int32)
    # XLA would drop a plain copy; flipping a bit costs nothing next to moving it.
    seconds = timing.measure(jax.jit(lambda x: x ^ 1), source)
    return 2 * size / seconds


def run_suite(name: str) -> Iterator[Row]:
    """Rows of a suite, `fraction_of_copy` filled in."""
    module = importlib.import_module(f"launch.bench_suites.{SUITES[name]}")
    copy = None
    for row in module.rows():
        if row.get("gb_per_s") is not None:
            if copy is None:  # not before: its buffers would count in the peak memory that a suite reports
                copy = copy_bandwidth()
                yield {
                    "name": "copy",
                    "shape": "",
                    "dtype": "",
                    "implementation": "xla",
                    "us": None,
                    "gb_per_s": copy / 1e9,
                    "fraction_of_copy": 1.0,
                }
            row["fraction_of_copy"] = row["gb_per_s"] * 1e9 / copy
        yield row


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    cells = [[_cell(row.get(c)) for c in _COLUMNS] for row in rows]
    widths = [max(len(x) for x in column) for column in zip(_COLUMNS, *cells)]
    lines = [_COLUMNS, *cells]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(line, widths)).rstrip() for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1000 else (
        f"{value:.0f}" if isinstance(value, float) else str(value)
    )  # fmt: skip


def main(f: flags.FlagValues) -> None:
    """Run the suite, print the table, write the rows."""
    # Peers in the same process need room on the device too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    out = None if f.out is None else pathlib.Path(f.out)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    device = jax.extend.backend.get_default_device()
    print(f"{f.suite} on {device.device_kind}, jax {jax.__version__}")
    rows = []
    for row in tqdm(run_suite(f.suite), desc=f.suite, unit="row", file=sys.stderr):
        rows.append(row)
        if out is not None:  # after every row, so that an interrupted run leaves what it measured
            out.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    for row in rows:
        if "error" in row:
            print(f"not measured: {row['implementation']}: {row['error']}")


if __name__ == "__main__":
    sys.exit(cli.run(define, main))
