"""`launch.aot` compiles for TPU slices on a machine without one."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import pytest

from launch import aot, cli
from models import zoo

libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (no wheel for this platform)"
)


@libtpu
@pytest.mark.xdist_group("libtpu")
def test_model_stages_of_a_slice(tmp_path, capsys):
    out = tmp_path / "rows.json"
    flags = {"topology": "v5e:2x2", "model": "kvref-draft-2m", "batch": 4, "context": 256, "chunk": 128}
    argv = [f"--{name}={value}" for name, value in flags.items()] + [f"--out={out}"]
    assert cli.run(aot.define, aot.main, argv) == 0
    prefill, decode = json.loads(out.read_text())
    assert (prefill["stage"], decode["stage"]) == ("prefill", "decode")
    assert prefill["calls"] == 2 and prefill["tokens_per_call"] == 4 * 128
    for row in (prefill, decode):
        assert row["topology"] == "v5e:2x2" and row["devices"] == 4
        assert 0 < row["optimal_seconds"] < 1 and row["seconds_from"] in ("compiler", "roofline")
    # 2 layers x 1 KV head x (256 + 128) slots x 64 channels x K and V in bfloat16, one row per device.
    cache = 2 * 384 * 64 * 2 * 2
    weights = 2 * 8192 * 192
    assert decode["argument_bytes"] > cache + weights
    assert decode["hbm_bytes_per_device"] < 4 * (cache + 2 * weights)
    assert "decode" in capsys.readouterr().out


@libtpu
@pytest.mark.parametrize(
    "argv,message",
    [
        (["--topology=v9z:2x2", "--kernels"], "--topology='v9z:2x2'"),
        (["--topology=v5e:2x2"], "nothing to compile"),
        (["--topology=v5e:2x2", "--model=gpt-9"], "model shape 'gpt-9' is not known"),
        (["--topology=v5e:2x2", "--model=kvref-draft-2m", "--batch=3"], "give --mesh"),
        (["--topology=v5e:2x2", "--model=kvref-draft-2m", "--batch=4", "--policy=nope"], "nope"),
        (["--topology=v5e:2x2", "--model=kvref-draft-2m", "--mesh=data=3"], "takes 3 of the 4 devices"),
        (
            ["--topology=v5e:2x2", "--model=kvref-draft-2m", "--batch=4", "--context=999999"],
            "exceeds the model",
        ),
    ],
)
def test_bad_input_is_one_line(argv, message, capsys):
    assert cli.run(aot.define, aot.main, argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error


@libtpu
@pytest.mark.xdist_group("libtpu")
def test_a_window_is_flushed_in_place(monkeypatch):
    """A KIVI step holds no second copy of any layer's codes or scales: they would be 18 times what it holds now.

    Eight layers, since libtpu aborts where a branch hands through as many caches.
    """
    whole, compile_stage = zoo.shape("llama3-8b"), aot.compile_stage
    cut = dataclasses.replace(whole, layers=8, ropes=whole.ropes[:8], windows=whole.windows[:8])
    monkeypatch.setattr(zoo, "shape", lambda name: cut)
    monkeypatch.setattr(
        aot,
        "compile_stage",
        lambda stage, *a, **k: (stage == "decode" and compile_stage(stage, *a, **k)) or {"stage": stage},
    )
    _, row = aot.model_rows("v5e:2x4", "llama3-8b", "kivi(bits=4)", batch=16, context=32768)
    layer = (
        16 * 32768 * 128 * 2 * 4.5 / 8
    )  # bytes on one device: rows, slots, channels, K and V, bits with scales
    assert row["argument_bytes"] > 8 * layer
    assert row["temp_bytes"] < layer / 2
