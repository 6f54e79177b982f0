"""The store of pages on disk: what it refuses before anything is read, records, checksums, memory, its files."""

from __future__ import annotations

import collections
import errno
import os
import pathlib

import numpy as np
import pytest

import kvjax.policies as P
from kvjax.cache import checkpoint, disk
from kvjax.generation import limits
from kvjax.policies.placement import Offload
from tests.policies.disk_cases import LENGTHS, PAGE, QUEST, generator, on_disk, plan_of, prompts_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pages")


# --------------------------------------------------------------------------------------------- before anything is read


def test_too_little_space_or_memory_is_told_before_with_the_numbers(folder, monkeypatch):
    gen = generator(on_disk(QUEST, folder, memory=10**9))
    need = 3 * 2 * 2 * 10 * PAGE
    usage = collections.namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(disk.shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
        with pytest.raises(
            OSError, match=rf"needs {need:,} bytes \(3 rows of 160 tokens\), 1,000 are free"
        ) as e:
            gen.prefill(prompts_of(LENGTHS), 16)
        assert e.value.errno == errno.ENOSPC and e.value.filename == str(folder)
    monkeypatch.setattr(limits, "free_host_bytes", lambda: need - 1)
    with pytest.raises(
        MemoryError, match=rf"needs {need:,} bytes of host memory .* {need - 1:,} are available"
    ):
        gen.prefill(prompts_of(LENGTHS), 16)


def test_a_directory_that_is_missing_or_closed_is_named(folder, monkeypatch):
    with pytest.raises(FileNotFoundError, match="needs one that exists") as e:
        generator(on_disk(QUEST, folder / "none")).prefill([[1] * 40], 8)
    assert e.value.filename == str(folder / "none")

    def refuse(dir):
        raise PermissionError(errno.EACCES, "Permission denied", dir)

    monkeypatch.setattr(disk.tempfile, "TemporaryFile", refuse)
    with pytest.raises(PermissionError, match=r"cannot write there \(Permission denied\); name another"):
        generator(on_disk(QUEST, folder)).prefill([[1] * 40], 8)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("memory=-1", "memory must be at least 0"),
        ("memory=0.5", "must be an int"),
        ("disk=3", "must be a string"),
    ],
)
def test_bad_arguments(argument, words):
    with pytest.raises(ValueError, match=words):
        P.parse(f"quest | offload({argument})")


def test_methods_with_a_placement_of_their_own_take_that_of_offload(folder):
    for name in ("leoam", "shadowkv", "infinigen"):
        assert P.parse(name).placement.disk == ""
        assert on_disk(name, folder, memory=7).placement == Offload(disk=str(folder), memory=7)
    assert P.parse("leoam | int8").placement == Offload()


def test_a_cache_on_disk_is_not_saved_without_its_pages(folder, tmp_path):
    plan = plan_of(on_disk(QUEST, folder))
    with pytest.raises(ValueError, match="are not saved"):
        checkpoint.save(tmp_path / "saved", plan, None)


# ------------------------------------------------------------------------------------------------------------ the store


def made(folder, spec=QUEST, **kwargs):
    return disk.Store(plan_of(on_disk(spec, folder, **kwargs)))


def raw(files, layer, seed=0):
    """Random fields of a layer, as unsigned integers."""
    rng, section = np.random.default_rng(seed), files.sections[layer]
    slots = section.pages * section.blocks
    out = {}
    for part in section.parts:
        shape = list(part.shape)
        shape[part.axis] *= slots
        top = np.iinfo(part.dtype).max
        out[part.name] = rng.integers(0, top, (3, section.heads, *shape), part.dtype, endpoint=True)
    return out


@pytest.mark.parametrize(
    "spec", [QUEST, "quest(page=8, skip_layers=0) | kivi(bits=4, group=8, residual=64)", "fp8"]
)
def test_blocks_come_back_as_they_were_for_every_field_layout(spec, folder):
    files = made(folder, spec, memory=0)
    layer = max(files.sections)
    section, fields = files.sections[layer], raw(files, layer)
    files.write(layer, np.full((3, 2), section.pages), fields)
    table = np.random.default_rng(1).integers(0, section.pages * section.blocks, (3, 2, 5))
    wanted = np.random.default_rng(2).random((3, 2, 5)) < 0.7
    names = tuple(fields)[1:]
    got = files.read(layer, table, wanted, names)
    assert set(got) == set(names) and not files.failed
    for part in section.parts[1:]:
        size = part.shape[part.axis]
        for b, h, n in np.ndindex(3, 2, 5):
            at = slice(table[b, h, n] * size, (table[b, h, n] + 1) * size)
            want = fields[part.name][b, h][(slice(None),) * part.axis + (at,)] if wanted[b, h, n] else 0
            assert np.array_equal(got[part.name][b, h, n], np.broadcast_to(want, part.shape))
    files.close()


def test_pages_are_written_once_when_complete_and_again_only_where_entries_move(folder, monkeypatch):
    calls, pwrite = [], os.pwrite

    def count(file, data, offset):
        calls.append((len(data), offset))
        return pwrite(file, data, offset)

    monkeypatch.setattr(disk.os, "pwrite", count)
    for spec, again in ((QUEST, 3), (f"snapkv(budget=160) | {QUEST}", 5)):
        files, total = made(folder, spec), []
        for pages in (2, 2, 5):
            files.write(0, np.full((3, 2), pages), raw(files, 0))
            total.append(sum(n for n, _ in calls))
            calls.clear()
        assert total == [6 * 2 * PAGE, 0 if again == 3 else 6 * 2 * PAGE, 6 * again * PAGE]
        files.close()


def test_memory_holds_the_pages_read_last(folder):
    files = made(folder, memory=3 * (PAGE - 4) + 5)
    files.write(0, np.full((3, 2), 10), raw(files, 0))
    recent, rng = collections.OrderedDict(), np.random.default_rng(0)
    for _ in range(60):
        block, missed = int(rng.integers(0, 24)), False
        key = block // 4
        if key not in recent:
            missed = True
        recent[key] = None
        recent.move_to_end(key)
        if len(recent) > 3:
            recent.popitem(last=False)
        wanted = np.zeros((3, 2, 1), bool)
        wanted[2, 1] = True
        files.read(0, np.full((3, 2, 1), block), wanted, ("k",))
        assert files.report()[1].tolist() == [int(missed), 0]
    files.close()


def test_a_record_in_another_place_is_damaged(folder):
    """Its checksum is right for its bytes; where it stands is part of it."""
    files = made(folder, memory=0)
    files.write(0, np.full((3, 2), 10), raw(files, 0))
    section = files.sections[0]
    with files.file(0).open("r+b") as file:
        file.seek(section.place(1, 4))
        record = file.read(PAGE)
        file.seek(section.place(0, 4))
        file.write(record)
    everything = np.broadcast_to(np.arange(40), (3, 2, 40))
    got = files.read(0, everything, np.ones((3, 2, 40), bool), ("v",))["v"]
    assert list(files.failed) == [0] and "page 4 of layer 0, head 0 is damaged" in files.failed[0]
    assert not got[0].any() and got[1].any() and got[2].any()
    files.close()


def test_files_are_kept_on_request(folder):
    files = made(folder, keep=True)
    files.write(0, np.full((3, 2), 1), raw(files, 0))
    files.close()
    assert (
        files.file(2).stat().st_size == PAGE * 11
    )  # one page a head; the second head's pages begin after 10
    for n in range(3):
        files.file(n).unlink()
    pathlib.Path(files.path).rmdir()


def test_a_directory_that_vanishes_fails_all_rows(folder):
    gone = folder / "gone"
    gone.mkdir()
    policy = on_disk(QUEST, gone)
    gone.rmdir()
    files = disk.Store(plan_of(policy))
    assert sorted(files.failed) == [0, 1, 2] and all("No such file" in e for e in files.failed.values())
    files.write(0, np.full((3, 2), 1), raw(files, 0))
    assert files.report()[0].all()
    files.close()
