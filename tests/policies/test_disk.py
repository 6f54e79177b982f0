"""Decodes with pages on disk: the same tokens as on the device, bytes read, rows that fail alone, files that go away."""

from __future__ import annotations

import dataclasses
import errno
import gc
import os
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvjax.policies as P
from kvjax import arrays
from kvjax.cache import disk, traffic
from kvjax.generation import engine
from tests.policies.disk_cases import (
    LENGTHS,
    LM,
    PAGE,
    PARAMS,
    QUEST,
    generator,
    on_disk,
    plan_of,
    prompts_of,
    the_store,
)
from tests.toy import ragged, steps

STEPS = np.random.default_rng(1).integers(0, 64, (3, 12))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pages")


def prefilled(plan, lengths=LENGTHS):
    return engine.prefill(LM, plan, PARAMS, *ragged(lengths, 160))[1]


def flip(path, offset):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


# ---------------------------------------------------------------------------------------------------- whole decodes


@pytest.mark.parametrize(
    "spec",
    [
        QUEST,
        pytest.param("int8", marks=pytest.mark.slow),
        pytest.param("leoam(read=16, chunk=8, rounds=1, skip_layers=0)", marks=pytest.mark.slow),
        pytest.param(
            "quest(read=0.5, page=8, skip_layers=0) | kivi(bits=4, group=8, residual=64)",
            marks=pytest.mark.slow,
        ),
        pytest.param("snapkv(budget=48, window=4) | " + QUEST, marks=pytest.mark.slow),
        # Choices that are kept for several steps, and scores from all stored entries, inside a branch:
        pytest.param("louiskv(read=12, per=4, sink=2, recent=4, segments=4)", marks=pytest.mark.slow),
        pytest.param("exact_topk(read=16)", marks=pytest.mark.slow),
    ],
)
def test_logits_equal_those_on_the_device_to_the_bit_and_bytes_are_the_pages(spec, folder):
    plan = plan_of(on_disk(spec, folder, memory=0))
    alone = P.parse(spec)
    if alone.placement is not None:  # the oracle keeps everything on the device
        alone = dataclasses.replace(alone, placement=None)
    base = plan_of(alone)
    cache, want_cache = prefilled(plan), prefilled(base)
    want, _ = steps(LM, base, PARAMS, want_cache, STEPS)
    got, after = steps(LM, plan, PARAMS, cache, STEPS)
    assert np.array_equal(got, want)
    assert not after.disk.failed.any()
    files = the_store(cache)
    complete = [np.asarray(layer.start) // plan.span(i) for i, layer in enumerate(cache.layers)]
    sizes = [section.record_bytes for section in files.sections.values()]
    written = sum(int(n.sum()) * size for n, size in zip(complete, sizes))
    assert written == sum(_data_bytes(files, row) for row in range(3)) > 0
    assert arrays.nbytes(cache) == plan.device_nbytes()
    assert plan.nbytes() == plan.device_nbytes() + plan.disk_nbytes()  # memory=0: no pages in host memory
    disk.close(cache.disk.handle)


def _data_bytes(files, row):
    """Bytes of complete records in a row's file: those with a right checksum, found by an independent reader."""
    if not files.file(row).exists():  # no page was complete
        return 0
    data, found = files.file(row).read_bytes(), 0
    for section in files.sections.values():
        for head in range(section.heads):
            for page in range(section.pages):
                at = section.offset + (head * section.pages + page) * section.record_bytes
                record = data[at : at + section.record_bytes]
                where = b"".join(n.to_bytes(4, "little") for n in (row, section.layer, head, page))
                stored = int.from_bytes(record[-4:], "little")
                found += len(record) if zlib.crc32(where + record[:-4]) == stored else 0
    return found


def test_bytes_read_from_disk_and_moved_per_step(folder):
    """Every step: pages (16 slots) of the blocks (4) that it did not hold; those in memory are not read again."""
    plan = plan_of(on_disk(QUEST, folder, memory=0))
    cache = prefilled(plan)
    assert the_store(cache).sections[1].record_bytes == PAGE
    held = [np.full((3, 2, 3), -1) for _ in range(2)]
    for token in STEPS.T[:4]:
        _, cache = steps(LM, plan, PARAMS, cache, token[:, None])
        blocks, pages = 0, [set(), set()]
        for i, layer in enumerate(cache.layers):
            table, start = np.asarray(layer.index["held"]), np.asarray(layer.start)
            for b, h in np.ndindex(3, 2):
                new = {n for n in table[b, h] if n >= 0 and n * 4 < start[b, h]} - set(held[i][b, h])
                blocks += len(new)
                pages[i] |= {(b, h, n // 4) for n in new}
            held[i] = table
        assert traffic.moved_bytes(plan, cache) == blocks * 4 * 2 * 8 * 4
        assert cache.disk.pages.tolist() == [len(p) for p in pages]
        assert traffic.disk_bytes(plan, cache) == sum(map(len, pages)) * PAGE > 0
    disk.close(cache.disk.handle)


@pytest.fixture(scope="module")
def twins(folder):
    """Generators on the device and on disk; all tests share their two programs."""
    return generator(P.parse(QUEST)), generator(on_disk(QUEST, folder, memory=4 * PAGE))


def decoded(gen, lengths, between=lambda session: None, new=12):
    session = gen.prefill(prompts_of(lengths), 16)
    between(session)
    return session.decode([new] * len(lengths)), session


@settings(max_examples=12, deadline=None)
@given(lengths=st.lists(st.integers(1, 160), min_size=3, max_size=3))
def test_any_ragged_lengths_give_the_tokens_of_the_device(twins, lengths):
    lengths = [*lengths[:2], max(lengths[2], 129)]  # one bucket
    want, _ = decoded(twins[0], lengths)
    got, session = decoded(twins[1], lengths)
    assert got == want and not session.errors
    assert session.disk_cache_bytes == 3 * 2 * 2 * 10 * PAGE  # rows, layers, heads, pages of 160 slots
    assert session.host_cache_bytes == 4 * PAGE


def test_longer_texts_and_other_files_compile_nothing_new(twins):
    decoded(twins[1], (150, 20, 3), new=2)
    programs = [f._cache_size() for f in (engine.prefill, engine.begin, engine.decode)]
    for new in (5, 16):
        decoded(twins[1], (131 + new, 90, 40), new=new)
    assert [f._cache_size() for f in (engine.prefill, engine.begin, engine.decode)] == programs


# ------------------------------------------------------------------------------------------------------ rows that fail


def test_one_flipped_bit_ends_its_own_row_with_the_file_and_the_page(twins):
    want, _ = decoded(twins[0], LENGTHS)

    def damage(session):
        files = the_store(session.cache)
        section = files.sections[1]
        for page in range(97 // 16):  # whichever it reads first
            flip(files.file(1), section.place(0, page) + 100)

    got, session = decoded(twins[1], LENGTHS, damage)
    assert [got[0], got[2]] == [want[0], want[2]]
    assert got[1].finish == "error" and got[1].tokens == want[1].tokens[: len(got[1].tokens)]
    assert len(got[1].tokens) < len(want[1].tokens)
    assert list(session.errors) == [1] and got[1].error == session.errors[1]
    assert "\n" not in got[1].error
    for words in ("row 1: ", "row001.kv: page ", "of layer 1, head 0 is damaged (CRC-32 ", "run it again"):
        assert words in got[1].error
    assert session.cache.disk.failed.tolist() == [False, True, False]


def test_a_file_cut_short_ends_its_own_row(twins):
    want, _ = decoded(twins[0], LENGTHS)
    got, _ = decoded(twins[1], LENGTHS, lambda s: os.truncate(the_store(s.cache).file(2), PAGE))
    assert got[:2] == want[:2]
    assert got[2].finish == "error" and f"of {PAGE} bytes)" in got[2].error and "is cut short" in got[2].error


def test_a_full_disk_ends_the_rows_that_do_not_fit(twins, monkeypatch):
    want, _ = decoded(twins[0], LENGTHS)
    pwrite = os.pwrite

    def full(file, data, offset):
        if os.readlink(f"/proc/self/fd/{file}").endswith("row000.kv") and offset >= 3 * PAGE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(file, data, offset)

    monkeypatch.setattr(disk.os, "pwrite", full)
    got, session = decoded(twins[1], LENGTHS)
    assert got[1:] == want[1:]
    assert got[0].tokens == [] and got[0].finish == "error"
    assert f"row000.kv: the disk is full: layer 0 needs {2 * 10 * PAGE:,} bytes, " in got[0].error
    assert "bytes are free" not in got[0].error and "are free; make room" in got[0].error


def test_writes_that_take_several_calls_are_completed(twins, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(disk.os, "pwrite", lambda file, data, at: pwrite(file, data[:1000], at))
    got, session = decoded(twins[1], LENGTHS)
    monkeypatch.undo()
    assert got == decoded(twins[0], LENGTHS)[0] and not session.errors


@pytest.mark.slow
def test_a_row_that_fails_while_a_question_is_read(twins):
    """A question after the prompt attends to everything: the damaged page of its own row alone."""
    questions = [[1, 2, 3], [4], [5, 6]]
    want = twins[0].prefill(prompts_of(LENGTHS), 16)
    want.extend(questions)
    session = twins[1].prefill(prompts_of(LENGTHS), 16)
    flip(the_store(session.cache).file(0), 5)
    session.extend(questions)
    assert list(session.errors) == [0] and session.cache.disk.failed.tolist() == [True, False, False]
    got, whole = session.decode([8] * 3), want.decode([8] * 3)
    assert got[1:] == whole[1:] and got[0].tokens == []


def test_files_go_when_the_session_is_released(twins):
    session = twins[1].prefill(prompts_of(LENGTHS), 16)
    path, handle = the_store(session.cache).path, session.cache.disk.handle
    assert sorted(p.name for p in path.iterdir()) == [f"row{n:03}.kv" for n in range(3)]
    assert the_store(session.cache)._finish.atexit
    del session
    gc.collect()
    assert not path.exists()
    with pytest.raises(RuntimeError, match="released"):
        disk.store(handle)
