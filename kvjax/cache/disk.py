"""Pages of offloaded layers in files: the disk tier, host side (numpy and the operating system only).

A store belongs to one cache. It has a directory of its own and in it one file a row (sequence), `row000.kv`, made of
records of fixed size, so that a record's place follows from its numbers:

    file    = for every offloaded layer, for every KV head, its pages in order
    record  = payload, then its CRC-32 as 4 bytes, little endian
    payload = the page's blocks in order; of each block the codec's fields, one after another, in C order

The checksum starts from (row, layer, head, page), so that a record in the wrong place is found as well. A record is
written once, when its page is complete (again only where eviction between the chunks of a prompt moves entries), and
verified whenever it is read. Files are read and written with `pread` and `pwrite`, not through a memory map: with a
map a full disk or a file cut short kills the process.

What goes wrong with a row's file ends that row: `Store.failed` holds one line that names the file, and nothing of the
row is read or written any more.
"""

from __future__ import annotations

import collections
import dataclasses
import errno
import itertools
import math
import os
import pathlib
import shutil
import struct
import tempfile
import weakref
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from kvjax.arrays import itembits

_CRC = struct.Struct("<I")
_WHERE = struct.Struct("<4I")  # row, layer, head, page
AGAIN = "run it again, elsewhere if this repeats"


@dataclasses.dataclass(frozen=True)
class Part:
    """One field of a block."""

    name: str
    shape: tuple[int, ...]  # of a block, without rows and heads
    axis: int  # of the slots in it
    dtype: str  # unsigned, as wide as the field's elements

    @property
    def nbytes(self) -> int:
        """Bytes in a block."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Section:
    """One layer of every row's file."""

    layer: int
    heads: int
    pages: int  # per head
    blocks: int  # per page
    parts: tuple[Part, ...]
    offset: int  # bytes before it

    @property
    def block_bytes(self) -> int:
        """Bytes of one block's fields."""
        return sum(part.nbytes for part in self.parts)

    @property
    def record_bytes(self) -> int:
        """Bytes of a page and its checksum."""
        return self.blocks * self.block_bytes + _CRC.size

    @property
    def nbytes(self) -> int:
        """Bytes of the layer in each file."""
        return self.heads * self.pages * self.record_bytes

    def place(self, head: int, page: int) -> int:
        """Where a record begins."""
        return self.offset + (head * self.pages + page) * self.record_bytes


def sections(plan: Any) -> dict[int, Section]:
    """The layout of every row's file under a `Plan`, by layer."""
    out, offset, shape = {}, 0, plan.shape
    for i, lp in enumerate(plan.layers):
        if not lp.on_disk:
            continue
        block, span = plan.block(i), plan.span(i)
        parts = tuple(
            Part(n, (*f.before, block // f.per, *f.suffix), len(f.before), f"uint{itembits(f.dtype)}")
            for n, f in lp.policy.codec.fields(shape.head_dim, shape.dtype).items()
        )
        out[i] = Section(i, shape.kv_heads, plan.host_slots(i) // span, span // block, parts, offset)
        offset += out[i].nbytes
    return out


def check(plan: Any) -> None:
    """OSError, with the numbers, unless a cache of `plan` fits into its directory and files can be made there."""
    place, need = plan.policy.placement.disk, plan.disk_nbytes()
    if not os.path.isdir(place):
        raise OSError(
            errno.ENOENT, "no such directory; offload(disk=...) needs one that exists, make it first", place
        )
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as e:
        raise OSError(
            e.errno, f"offload(disk=...) cannot write there ({e.strerror}); name another directory", place
        ) from None
    free = shutil.disk_usage(place).free
    if need > free:
        raise OSError(
            errno.ENOSPC,
            f"offload(disk=...) needs {need:,} bytes ({plan.batch} rows of {plan.prompt} tokens), {free:,} are free; "
            "shorten the prompts, take fewer at once or name another directory",
            place,
        )


class _Damaged(Exception):
    """A record that is not what was written."""


class Store:
    """The files of one cache. All numbers are host integers; calls come one after another."""

    def __init__(self, plan: Any) -> None:
        placement = plan.policy.placement
        self.rows, self.sections = plan.batch, sections(plan)
        self.failed: dict[int, str] = {}
        self.pages_read = np.zeros(len(plan.layers), np.int32)  # since `report`
        self._rewrites = plan.policy.compresses
        self._written: dict[tuple[int, int], np.ndarray] = {}  # (row, layer) -> complete pages per head
        self._files: dict[int, int] = {}
        self._memory, self._held = placement.memory, 0
        self._recent: collections.OrderedDict[tuple[int, ...], bytes] = collections.OrderedDict()
        try:
            self.path = pathlib.Path(tempfile.mkdtemp(prefix="kvjax-", dir=placement.disk))
        except OSError as e:
            self.path = pathlib.Path(placement.disk)
            self.failed = {
                row: f"row {row}: {placement.disk}: {e.strerror}; {AGAIN}" for row in range(self.rows)
            }
            return
        self._finish = weakref.finalize(self, _remove, self._files, None if placement.keep else self.path)

    def file(self, row: int) -> pathlib.Path:
        """The file of a row."""
        return self.path / f"row{row:03}.kv"

    def close(self) -> None:
        """Close the files and, unless they are to be kept, remove them."""
        if hasattr(self, "_finish"):
            self._finish()

    def report(self) -> tuple[np.ndarray, np.ndarray]:
        """(bool [rows] failed, int32 [layers] pages read from disk since the last report)."""
        failed = np.zeros(self.rows, bool)
        failed[list(self.failed)] = True
        pages, self.pages_read = self.pages_read, np.zeros_like(self.pages_read)
        return failed, pages

    def write(self, layer: int, complete: np.ndarray, fields: Mapping[str, np.ndarray]) -> None:
        """Store what is new of a layer.

        complete: int [rows, heads] complete pages. fields: [rows, heads, before, pages * slots / per, ...].
        """
        section = self.sections[layer]
        for row in range(self.rows):
            if row in self.failed:
                continue
            blocks = _to_blocks(section, {n: x[row] for n, x in fields.items()})
            try:
                self._write_row(section, row, complete[row], blocks)
            except OSError as e:
                name = self.file(row)
                what = "the disk is full" if e.errno == errno.ENOSPC else f"cannot be written ({e.strerror})"
                self.failed[row] = (
                    f"row {row}: {name}: {what}: layer {layer} needs {section.nbytes:,} bytes, {_free(self.path):,} are "
                    "free; make room or name another directory, then run it again"
                )

    def _write_row(self, section: Section, row: int, complete: np.ndarray, blocks: np.ndarray) -> None:
        """blocks: uint8 [heads, pages * blocks, block_bytes]."""
        key = (row, section.layer)
        first = self._written.get(key, np.zeros_like(complete))
        if self._rewrites:
            first = np.zeros_like(complete)
            for old in [k for k in self._recent if k[:2] == key]:
                self._held -= len(self._recent.pop(old))
        pages = blocks.reshape(section.heads, section.pages, -1)
        for head in range(section.heads):
            start, end = int(first[head]), int(complete[head])
            if end <= start:
                continue
            out = bytearray()
            for page in range(start, end):
                payload = pages[head, page].tobytes()
                out += payload + _CRC.pack(_checksum(payload, row, section.layer, head, page))
            self._put(row, bytes(out), section.place(head, start))
        self._written[key] = np.array(complete)

    def _put(self, row: int, data: bytes, offset: int) -> None:
        file = self._open(row)
        while data:
            done = os.pwrite(file, data, offset)
            data, offset = data[done:], offset + done

    def _open(self, row: int) -> int:
        if row not in self._files:
            self._files[row] = os.open(self.file(row), os.O_RDWR | os.O_CREAT, 0o600)
        return self._files[row]

    def read(
        self, layer: int, table: np.ndarray, wanted: np.ndarray, names: tuple[str, ...]
    ) -> dict[str, np.ndarray]:
        """Blocks `table` int [rows, heads, n] of a layer where `wanted` (bool, likewise); zeros elsewhere.

        Returns the fields `names`, [rows, heads, n, *block shape] each. A row that fails on the way is all zeros.
        """
        section = self.sections[layer]
        size = section.block_bytes
        out = np.zeros((*table.shape, size), np.uint8)
        for row in range(self.rows):
            if row in self.failed:
                continue
            pages: dict[tuple[int, int], bytes] = {}  # of this call, for what `memory` does not hold
            try:
                for head, n in np.argwhere(wanted[row]):
                    page, part = divmod(int(table[row, head, n]), section.blocks)
                    at = int(head), page
                    if at not in pages:
                        pages[at] = self._page(section, row, *at)
                    out[row, head, n] = np.frombuffer(pages[at], np.uint8, size, part * size)
            except (OSError, _Damaged) as e:
                why = f"cannot be read ({e.strerror})" if isinstance(e, OSError) else str(e)
                self.failed[row] = (
                    f"row {row}: {self.file(row)}: page {page} of layer {layer}, head {head} {why}; {AGAIN}"
                )
                out[row] = 0
        return _from_blocks(section, out, names)

    def _page(self, section: Section, row: int, head: int, page: int) -> bytes:
        """A page's payload, from memory or verified from its file."""
        key = (row, section.layer, head, page)
        if key in self._recent:
            self._recent.move_to_end(key)
            return self._recent[key]
        size = section.record_bytes
        data = os.pread(self._open(row), size, section.place(head, page))
        if len(data) < size:
            raise _Damaged(f"is cut short ({len(data)} of {size} bytes)")
        self.pages_read[section.layer] += 1
        payload, (want,) = data[: -_CRC.size], _CRC.unpack(data[-_CRC.size :])
        got = _checksum(payload, row, section.layer, head, page)
        if got != want:
            raise _Damaged(f"is damaged (CRC-32 {got:08x}, written with {want:08x})")
        if len(payload) <= self._memory:
            self._recent[key] = payload
            self._held += len(payload)
            while self._held > self._memory:
                self._held -= len(self._recent.popitem(last=False)[1])
        return payload


def _checksum(payload: bytes, *where: int) -> int:
    return zlib.crc32(payload, zlib.crc32(_WHERE.pack(*where)))


def _to_blocks(section: Section, fields: Mapping[str, np.ndarray]) -> np.ndarray:
    """Fields [heads, before, slots / per, ...] of unsigned integers -> uint8 [heads, blocks, block_bytes]."""
    count, out = section.pages * section.blocks, []
    for part in section.parts:
        x, axis = fields[part.name], 1 + part.axis
        x = x.reshape(*x.shape[:axis], count, part.shape[part.axis], *x.shape[axis + 1 :])
        x = np.ascontiguousarray(np.moveaxis(x, axis, 1)).reshape(section.heads, count, -1)
        out.append(x.view(np.uint8))
    return np.concatenate(out, axis=-1)


def _from_blocks(section: Section, x: np.ndarray, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """uint8 [rows, heads, n, block_bytes] -> fields [rows, heads, n, *block shape] of unsigned integers."""
    out, at = {}, 0
    for part in section.parts:
        if part.name in names:
            got = np.ascontiguousarray(x[..., at : at + part.nbytes]).view(part.dtype)
            out[part.name] = got.reshape(*x.shape[:-1], *part.shape)
        at += part.nbytes
    return out


def _free(path: pathlib.Path) -> int:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return 0


def _remove(files: dict[int, int], path: pathlib.Path | None) -> None:
    for file in files.values():
        os.close(file)
    files.clear()
    if path is not None:
        shutil.rmtree(path, ignore_errors=True)


_NUMBERS = itertools.count(1)
_STORES: dict[
    int, Store
] = {}  # handle -> open store: compiled programs are shared, and are told which one to use


def open_store(plan: Any) -> int:
    """The handle of a new store."""
    handle = next(_NUMBERS)
    _STORES[handle] = Store(plan)
    return handle


def store(handle: Any) -> Store:
    """The open store of a handle; RuntimeError when it was closed."""
    found = _STORES.get(int(handle))
    if found is None:
        raise RuntimeError("the files of this cache were removed when its session was released")
    return found


def close(handle: int) -> None:
    """Close a store and remove its files; a handle that is closed already is ignored."""
    found = _STORES.pop(int(handle), None)
    if found is not None:
        found.close()
