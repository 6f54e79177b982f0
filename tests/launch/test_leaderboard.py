"""tools/leaderboard.py on rows made up here."""

import importlib.util
import json
import pathlib
import sys

import pytest

TOOL = pathlib.Path(__file__).parents[2] / "tools" / "leaderboard.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("leaderboard", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(policy, task, score, size):
    return {"policy": policy, "task": task, "metric": "string_match", "score": score, "n": 2, "cache_bytes": size,
            "full_cache_bytes": 1000, "read_fraction": 1.0, "prefill_s": 0.25, "decode_s": 0.5}  # fmt: skip


ROWS = [
    row("full", "vt", 90, 1000), row("full", "cwe", 70, 1000),
    row("int8", "vt", 10, 500), row("int8", "cwe", 10, 500),
    row("snapkv(budget=0.5) | adakv", "vt", 60, 400), row("snapkv(budget=0.5) | adakv", "cwe", 60, 600),
    row("kvtuner(pairs=((8, 4), (4, 2)))", "vt", 40, 280), row("kvtuner(pairs=((8, 4), (4, 2)))", "cwe", 60, 280),
]  # fmt: skip


def test_tables_and_plot(tool, tmp_path, monkeypatch):
    files = [tmp_path / name for name in ("a.json", "b.json", "ppl.json")]
    newer = [row("int8", "vt", 88, 538), row("int8", "cwe", 70, 538)]
    losses = [row("full", "ppl:x", 40.0, 1000), row("int8", "ppl:x", 40.1, 538)]
    for file, rows in zip(files, (ROWS, newer, losses)):
        file.write_text(json.dumps(rows))
    out, picture = tmp_path / "out.md", tmp_path / "out.png"
    given = [*map(str, files[:2]), "--perplexity", str(files[2]), f"--out={out}", f"--plot={picture}"]
    monkeypatch.setattr(sys, "argv", ["leaderboard", *given])
    tool.main()
    text = out.read_text()
    table, everything = text.split("## Every policy")
    order = [line.split("|")[1].strip(" `") for line in everything.splitlines() if line.startswith("| `")]
    assert order == ["full", "int8", "snapkv(budget=0.5) \\", "kvtuner(pairs=((8, 4), (4, 2)))"]
    assert "| 79.0 | 53.8% | 250.0 | 500.0 | 88 | 70 |" in everything  # the later file's rows
    assert "| `snapkv(budget=0.5) \\| adakv` | 60.0 | 50.0% |" in everything
    assert "snapkv" not in table  # it drops entries
    assert "| `int8` | 79.00 | +0.25% | 53.8% | 8.61 | 8.50 |" in table
    # (8 + 4 + 4 + 2) / 4 bits; a float16 scale with a float16 or 8-bit zero for every 64 channels.
    assert "| 28.0% | 4.48 | 4.91 |" in table
    assert picture.read_bytes()[:4] == b"\x89PNG"
