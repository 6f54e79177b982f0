"""launch.eval on the small embedded model: rows, query-agnostic compression, perplexity, resuming, bad input."""

import errno
import functools
import json
import os
import pathlib

import jax
import numpy as np
import pytest

from kvjax import policies
from kvjax.cache import disk
from launch import eval as command_eval
from launch.evaluation.engine import ModelEngine
from launch.evaluation.samples import Sample
from launch.evaluation.tasks import Source, Window, parse_tasks, windows
from launch.session import Session, compilations
from models import checkpoint, decoder
from models.lm import DecoderLM

ROW_FIELDS = {
    "policy", "task", "metric", "score", "n", "cache_bytes", "full_cache_bytes", "read_fraction", "prefill_s",
    "decode_s",
}  # fmt: skip
TEXT = "It was a dark night and the wind was high. The old man sat by the fire and told them of the sea. " * 3


@pytest.fixture(scope="module")
def session():
    model = checkpoint.load("kvref-draft-2m", "float32")
    return Session(model, DecoderLM(model.config, "float32"), "float32", None, None, None)


@pytest.fixture
def ruler(tmp_path):
    folder = tmp_path / "ruler"
    folder.mkdir()
    lines = [
        {"input": f"{TEXT * 4} {i}\nWhat is it?", "answer_prefix": " It is", "outputs": ["it", "xyzzy"]}
        for i in range(3)
    ]
    (folder / "qa.jsonl").write_text("\n".join(json.dumps(x) for x in lines))
    return folder


def test_rows_table_plot_and_a_second_run_that_computes_nothing(command, ruler, tmp_path, monkeypatch):
    out = tmp_path / "e.json"
    argv = [
        f"--tasks=ruler:{ruler}", "--policies=full;streaming_llm(budget=0.5); full", "--limit=2", f"--out={out}",
        "--batch=2",
    ]  # fmt: skip
    first = command(command_eval, *argv)
    assert first.code == 0, first.err
    rows = json.loads(out.read_text())
    assert [(r["policy"], r["task"], r["metric"], r["n"]) for r in rows] == [
        ("full", "qa", "string_match", 2),
        ("streaming_llm(budget=0.5)", "qa", "string_match", 2),
    ]
    for row in rows:
        assert set(row) == ROW_FIELDS
        assert 0 <= row["score"] <= 100
        assert row["prefill_s"] > 0
    full, half = rows
    assert full["cache_bytes"] == full["full_cache_bytes"] == half["full_cache_bytes"]
    assert 0.45 < half["cache_bytes"] / half["full_cache_bytes"] < 0.56
    assert (tmp_path / "e.png").read_bytes()[:4] == b"\x89PNG"
    assert "streaming_llm(budget=0.5)" in first.out
    assert "samples: 100%" in first.err

    monkeypatch.setattr(ModelEngine, "answer", lambda *a: pytest.fail("computed again"))
    again = command(command_eval, *argv)
    assert again.code == 0, again.err
    assert json.loads(out.read_text()) == rows
    assert len((tmp_path / "e.samples.jsonl").read_text().splitlines()) == 4


def test_a_policy_that_refuses_costs_its_own_rows_only(command, ruler, tmp_path):
    out, tasks = tmp_path / "e.json", f"--tasks=ruler:{ruler}"
    refused = "snapkv(budget=0.01)"  # refused once the context is known
    done = command(command_eval, tasks, f"--policies={refused};full", "--limit=1", f"--out={out}")
    assert done.code == 0, done.err
    first, second = json.loads(out.read_text())
    assert (first["n"], first["failed"], first["score"]) == (0, 1, None)
    assert second["n"] == 1 and "failed" not in second
    assert f"failed: 1 of {first['policy']}, qa; the first: " in done.out and "budget" in first["errors"][0]
    alone = command(command_eval, tasks, f"--policies={refused}", "--limit=1", f"--out={tmp_path / 'f.json'}")
    assert alone.code == 2 and first["errors"][0] in alone.err


@pytest.mark.slow
def test_a_full_disk_fails_one_sample_of_a_batch(command, ruler, tmp_path, monkeypatch):
    pages = tmp_path / "pages"
    pages.mkdir()
    pwrite = os.pwrite

    def full(file, data, offset):
        if os.readlink(f"/proc/self/fd/{file}").endswith("row001.kv"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(file, data, offset)

    out, policy = tmp_path / "e.json", f"offload(disk={str(pages)!r}, memory=0)"
    argv = [f"--tasks=ruler:{ruler}", f"--policies={policy}", "--limit=2", f"--out={out}", "--batch=2"]
    monkeypatch.setattr(disk.os, "pwrite", full)
    done = command(command_eval, *argv)
    assert done.code == 0, done.err
    (row,) = json.loads(out.read_text())
    assert (row["n"], row["failed"]) == (1, 1) and "row001.kv: the disk is full" in row["errors"][0]
    assert 0 < row["moved_bytes_last_step"] < row["disk_bytes_last_step"]  # whole pages, with checksums
    assert f"failed: 1 of {row['policy']}, qa; the first: row 1: " in done.out
    monkeypatch.setattr(disk.os, "pwrite", pwrite)
    command(command_eval, *argv)
    (row,) = json.loads(out.read_text())
    assert row["n"] == 2 and "failed" not in row


@functools.partial(jax.jit, static_argnames="config")
def plain_logits(params, config, tokens, positions):
    return decoder.forward(params, config, tokens, positions, None, decoder.causal_attend)[0][0]


def forward(session, tokens, width=128):
    """Logits float64 [tokens, vocab] of plain causal attention."""
    n, model = len(tokens), session.model
    ids, positions = np.zeros((1, width), np.int32), np.full((1, width), -1, np.int32)
    ids[0, :n], positions[0, :n] = tokens, np.arange(n)
    return np.asarray(plain_logits(model.params, model.config, ids, positions)[:n], np.float64)


def test_answers_follow_context_and_question_tokenized_apart(session):
    sample = Sample(TEXT, "\nWhat is it? It is", ("x",), 6, "t")
    engine = ModelEngine(session)
    engine.prepare([sample])
    (text,), cost = engine.answer("full", [sample])
    tokens = session.model.tokenizer.encode(sample.context) + session.encode(sample.question)
    for _ in range(6):
        tokens.append(int(forward(session, tokens)[-1].argmax()))
    assert text == session.model.tokenizer.decode(tokens[-6:])
    assert cost.cache_bytes == cost.full_cache_bytes


def test_query_aware_compresses_all_but_the_last_token(session):
    sample = Sample(TEXT, "\nWhat is it? It is", ("x",), 6, "t")
    blind, question = ModelEngine(session).split(sample)
    aware, last = ModelEngine(session, query_aware=True).split(sample)
    assert blind == session.model.tokenizer.encode(TEXT)
    assert aware + last == blind + question
    assert len(last) == 1


def test_perplexity_of_the_full_cache_is_that_of_plain_attention(session):
    tokens = session.encode(TEXT)
    parts = [
        Window(tuple(tokens[:20]), tuple(tokens[20:45])),
        Window(tuple(tokens[5:25]), tuple(tokens[25:32])),
    ]
    losses, _ = ModelEngine(session).negative_log_likelihood("full", parts)
    for window, loss in zip(parts, losses):
        context = [*session.begin(), *window.context]
        logits = forward(session, context + list(window.targets))[len(context) - 1 : -1]
        top = logits.max(axis=1)
        norm = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        want = np.mean(norm - logits[np.arange(len(window.targets)), list(window.targets)])
        assert loss == pytest.approx(want, rel=1e-4)


def test_windows_score_every_token_after_the_first_context_once():
    tokens = list(range(100, 137))
    parts = windows(tokens, context=8, targets=10)
    assert [t for w in parts for t in w.targets] == tokens[8:]
    assert [len(w.targets) for w in parts] == [10, 10, 9]
    for w in parts:
        at = tokens.index(w.targets[0])
        assert list(w.context) == tokens[at - 8 : at]
    with pytest.raises(ValueError, match="the text has 8 tokens: none follows the first 8"):
        windows(tokens[:8], 8, 10)


def test_perplexity_says_what_it_does_not_score(session, tmp_path):
    file = tmp_path / "book.txt"
    file.write_text(TEXT)
    total = len(session.encode(TEXT))
    source = Source(session.encode, limit=2, ppl_context=8, ppl_targets=8)
    (task,) = parse_tasks(f"ppl:{file}", source)
    every = -(-(total - 8) // 8)
    assert task.note == (
        f"ppl:{file}: 16 of {total} tokens scored; the first 8 are context only, and --limit takes 2 of {every} windows"
    )


def test_task_lists_name_generated_tasks_by_length_and_depth(session):
    tasks = parse_tasks("ruler_synthetic:1024,needle:512", Source(session.encode, limit=1))
    assert len(tasks) == 11 + 5
    assert tasks[0].name == "ruler_synthetic:1024/cwe"
    assert [t.name for t in tasks[11:]] == [f"needle:512/depth_{d}%" for d in (0, 25, 50, 75, 100)]


def test_policy_lists_are_canonical_and_at_all_is_every_method():
    assert command_eval.read_policies(" full ; snapkv(0.5,window = 8);full;") == [
        "full",
        "snapkv(budget=0.5, window=8)",
    ]
    every = command_eval.read_policies("@all")
    assert every == policies.names()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tasks=ruler:/no/such/dir"], "--tasks=ruler:/no/such/dir: no such folder"),
        (["--tasks=rulr:x"], "'rulr:x' is not a task; tasks are ruler:DIR, ruler_synthetic:LENGTH"),
        (["--tasks=needle:many"], "'needle:many' needs a length in tokens"),
        (["--tasks=needle:60"], "length 60 is too short for needle"),
        (["--tasks=needle:9000", "--limit=1"], "has a context of 8192; nothing was truncated"),
        (["--tasks=needle:512,needle:512"], "two tasks are called"),
        (["--tasks="], "--tasks is empty"),
        (["--tasks=ppl:/no/such/file"], "/no/such/file: No such file or directory"),
        (["--policies=;"], "--policies is empty"),
        (["--policies=full;nope"], "unknown policy 'nope'"),
        (["--limit=-1"], "--limit must not be negative, got -1"),
        (["--batch=0"], "--batch must be at least 1, got 0"),
        (["--out=e.csv"], "--out must end in .json, got e.csv"),
        (["--model=/no/such/model"], "/no/such/model"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(command, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    assert message in command(command_eval, *argv).error
    assert list(pathlib.Path().rglob("*.json")) == []


def test_samples_of_other_lengths_share_the_compiled_programs(session):
    engine = ModelEngine(session)
    samples = [
        Sample(TEXT, "\nWhat is it? It is", ("x",), 6, "t"),
        Sample(TEXT[:-40], "\nWhat was the old man told by the fire? He was told", ("x",), 70, "t"),
    ]
    engine.prepare(samples)
    before = compilations()
    engine.answer("int8", samples[:1])
    once = compilations()
    engine.answer("int8", samples[1:])
    assert once - before == 4  # prefill, extend, begin, decode
    assert compilations() == once


def test_a_sample_may_fill_the_whole_context(session):
    limit = session.lm.shape.max_context
    long = Sample(" word" * (limit - 40), "\nWhat is it? It is", ("x",), 8, "t")
    engine = ModelEngine(session)
    used = sum(map(len, engine.split(long))) + long.max_new_tokens
    fits = Sample(
        " word" * (limit - 40 + limit - used), long.question, long.answers, long.max_new_tokens, "t"
    )
    assert sum(map(len, engine.split(fits))) + fits.max_new_tokens == limit
    engine.prepare([fits, Sample("a", "b", ("x",), 500, "t")])
    over = Sample(fits.context + " word", fits.question, fits.answers, fits.max_new_tokens, "t")
    with pytest.raises(ValueError, match=f"needs {limit + 1} tokens with its answer"):
        engine.prepare([over])
