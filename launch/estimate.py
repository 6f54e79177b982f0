"""What a policy costs and what fits, from shapes alone: nothing is loaded, allocated or run.

Times are floors: bytes over bandwidth or operations over FLOP/s, whichever is larger, at the rates that one H200 reached
(`launch/cost_model.py`). `cache_bytes` and `full_cache_bytes` are of the prompt, `allocated_bytes` with room for new
tokens; `read_bytes` is what one decode step reads; `largest_batch` and `largest_context` fit weights and cache into
--memory_fraction of the device.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import Any

import jax
from absl import flags

from kvjax.policies import registry
from launch import cli
from launch.cost_model import DEVICES, Device, estimate
from models import checkpoint, zoo
from models.config import ModelConfig


def model_config(model: str) -> ModelConfig:
    """The configuration of a named shape, an embedded checkpoint or a model directory; weights are not read.

    Raises ValueError naming what is known.
    """
    if model in zoo.SHAPES:
        return zoo.SHAPES[model]
    if os.path.isdir(model) or model in checkpoint.embedded_names():
        return checkpoint.read_config(model)
    known = ", ".join(dict.fromkeys([*zoo.SHAPES, *checkpoint.embedded_names()]))
    raise ValueError(f"--model={model!r} is neither a directory nor a known shape; known: {known}")


def device_of(f: flags.FlagValues) -> Device:
    """The device of --device with what the other flags replace; given rates are taken as they are."""
    if f.device not in DEVICES:
        raise ValueError(f"--device={f.device!r} is not known; known: {', '.join(DEVICES)}")
    given = {
        "bandwidth": (f.bandwidth_gb_s, 1e9),
        "flops": (f.tflops, 1e12),
        "host_link": (f.host_link_gb_s, 1e9),
        "memory": (f.memory_gib, 2**30),
    }
    new = {field: value * unit for field, (value, unit) in given.items() if value is not None}
    return dataclasses.replace(DEVICES[f.device], **new)


def define(f: flags.FlagValues) -> None:
    """The flags of this command."""
    flags.DEFINE_string("model", "llama3-8b", f"{', '.join(zoo.SHAPES)}, or a model directory", flag_values=f)
    flags.DEFINE_string("policy", "full", "policy spec", flag_values=f)
    flags.DEFINE_integer("batch", 1, "rows", lower_bound=1, flag_values=f)
    flags.DEFINE_integer("context", 8192, "prompt tokens per row", lower_bound=1, flag_values=f)
    flags.DEFINE_integer("max_new_tokens", 128, "tokens to reserve", lower_bound=0, flag_values=f)
    flags.DEFINE_string("device", "h200", ", ".join(DEVICES), flag_values=f)
    positive: dict[str, Any] = {"lower_bound": 1e-9, "flag_values": f}
    flags.DEFINE_float("bandwidth_gb_s", None, "device memory, GB/s that are reached", **positive)
    flags.DEFINE_float("tflops", None, "bf16 TFLOP/s that are reached", **positive)
    flags.DEFINE_float("host_link_gb_s", None, "host memory to device, GB/s that are reached", **positive)
    flags.DEFINE_float("memory_gib", None, "device memory in GiB", **positive)
    flags.DEFINE_float(
        "memory_fraction", 0.9, "of it for weights and cache", lower_bound=0.0, upper_bound=1.0, flag_values=f
    )
    flags.DEFINE_bool("json", False, "print one JSON object as the last line", flag_values=f)
    flags.DEFINE_string("out", "", "write the JSON object to this file", flag_values=f)


def main(f: flags.FlagValues) -> None:
    """Print the estimate."""
    jax.config.update("jax_platforms", "cpu")  # shapes only: no accelerator is wanted
    row = {"model": f.model} | estimate(
        model_config(f.model),
        registry.parse(f.policy),
        device_of(f),
        batch=f.batch,
        context=f.context,
        new_tokens=f.max_new_tokens,
        memory_fraction=f.memory_fraction,
    )
    read = dict(row["read_bytes"])
    moved = read.pop("host")
    gib = 2**30
    print(
        f"{row['model']} on {row['device']}, {row['policy']}: {row['batch']} x {row['context']:,} tokens\n"
        f"  cache      {row['cache_bytes'] / gib:.3f} GiB of {row['full_cache_bytes'] / gib:.3f} uncompressed; "
        f"weights {row['weight_bytes'] / gib:.3f} GiB\n"
        f"  a step     reads {sum(read.values()) / gib:.3f} GiB "
        f"(weights {read['weights'] / gib:.3f}, cache {read['cache'] / gib:.3f}, index {read['index'] / gib:.3f}): "
        f"{row['step_s'] * 1e3:.3f} ms, {row['tokens_per_s']:.1f} tokens/s\n"
        f"  transfer   {moved / gib:.3f} GiB of a step from {row['host_cache_bytes'] / gib:.3f} GiB in host memory"
        f"{disk_note(row['disk_cache_bytes'] / gib)}\n"
        f"  prefill    {row['prefill_s']:.3f} s\n"
        f"  fits       {row['largest_batch']} rows of {row['context']:,}, or {row['largest_context']:,} tokens "
        f"in {row['batch']} rows (the model's context: {row['model_context']:,})"
    )
    if f.out:
        os.makedirs(os.path.dirname(f.out) or ".", exist_ok=True)
        with open(f.out, "w") as file:
            json.dump(row, file, indent=1)
    if f.json:
        print(json.dumps(row))


def disk_note(gib: float) -> str:
    """What the line on transfers says of pages on disk."""
    return f" and {gib:.3f} on disk, whose reads are not in the times" if gib else ""


if __name__ == "__main__":
    sys.exit(cli.run(define, main))
