"""Folders of safetensors: against the format's own library both ways, damaged, interrupted, and how much memory they take."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import random
import resource
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import convert.files
from convert.files import INDEX, NAMES, SMALL, WHOLE, Folder, new_folder, write_file, write_folder
from convert.mapping import Mapped, Rules, Tensors, copies, rule
from convert.steps import Concatenate

SHAPES = [(3,), (), (0, 4), (1, 3, 1)]
PIECE = 10 << 20  # bytes of a large tensor


def noise(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Any bits, what is not a number included."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    return (raw % 2 if dtype == torch.bool else raw).view(dtype).reshape(shape)


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())


def alike(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        (ours[n].dtype, ours[n].shape, raw(ours[n])) == (theirs[n].dtype, theirs[n].shape, raw(theirs[n])) for n in ours
    )


def read(path: Path) -> dict[str, Tensor]:
    folder = Folder(path)
    found = {name: folder.get(name) for name in folder.names()}
    for name, t in found.items():
        meta = folder.meta(name)
        assert meta.is_meta and (meta.shape, meta.dtype) == (t.shape, t.dtype)
    return found


def assembled(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file byte by byte."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def of(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# Against the library ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NAMES, ids=str)
def test_every_dtype_goes_both_ways(dtype: torch.dtype, tmp_path: Path) -> None:
    given = {f"{shape}": noise(shape, dtype) for shape in SHAPES}
    save_file(given, tmp_path / "theirs")
    write_file(Tensors(given), tmp_path / "ours")
    assert alike(read(tmp_path / "theirs"), given)
    assert alike(load_file(tmp_path / "ours"), given)
    assert alike(read(tmp_path / "ours"), given)


def test_dtypes_beside_one_another_lie_where_their_elements_may(tmp_path: Path) -> None:
    """Odd numbers of bytes before larger elements."""
    given = {str(dtype): noise((3,), dtype, i) for i, dtype in enumerate([torch.uint8, *NAMES])}
    write_file(Tensors(given), tmp_path / "a")
    assert alike(load_file(tmp_path / "a"), given) and alike(read(tmp_path / "a"), given)
    with (tmp_path / "a").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    assert header.pop("__metadata__") == {"format": "pt"} and length % 8 == 0
    for name, what in header.items():
        assert what["data_offsets"][0] % given[name].dtype.itemsize == 0, name


@pytest.mark.parametrize("size", [1, SMALL // 4 - 1, SMALL // 4, SMALL])
@pytest.mark.parametrize("before", [0, 1, 4, 7])
def test_tensors_that_begin_anywhere_are_read(size: int, before: int, tmp_path: Path) -> None:
    """As other writers leave them: headers of any length, and bytes before larger elements."""
    numbers = noise((size,), torch.float32)
    header = {"odd": of([before], 0, before, "U8"), "t": of([size], before, before + 4 * size)}
    for spaces in range(3):
        text = json.dumps(header).encode() + b" " * spaces
        path = assembled(tmp_path / "a", text, bytes(range(before)) + raw(numbers))
        found = read(path)
        assert raw(found["t"]) == raw(numbers) and found["odd"].tolist() == list(range(before))


class Given:
    """A source that gives what it has as it is."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> list[str]:
        return list(self.tensors)

    def meta(self, name: str) -> Tensor:
        return self.tensors[name].detach().to("meta")

    def get(self, name: str) -> Tensor:
        return self.tensors[name]


def test_tensors_that_lie_otherwise_are_written_in_order(tmp_path: Path) -> None:
    """Transposed, with gaps, spread from one number, shared by two names, and parameters."""
    base = torch.arange(24.0).view(4, 6)
    given: dict[str, Tensor] = {
        "turned": base.T,
        "gaps": base[:, ::2],
        "spread": torch.tensor([7.0]).expand(3, 2),
        "shared": base,
        "shared.too": base,
        "half": base[2:],
        "parameter": nn.Parameter(base.clone()),
    }
    write_file(Given(given), tmp_path / "a")
    assert alike(load_file(tmp_path / "a"), {name: t.detach() for name, t in given.items()})
    assert torch.equal(base, torch.arange(24.0).view(4, 6))


ODD = ["with space", "Grüße", "日本", "🐢", "a/b\\c", "line\nbreak", "quote'\"", "{0}", "\x01", "..", "", "a.b" * 200]


def test_names_of_any_kind_are_kept(tmp_path: Path) -> None:
    given = {name: torch.tensor(float(i)) for i, name in enumerate(ODD)}
    write_file(Tensors(given), tmp_path / "a", about={"by": "Grüße"})
    assert alike(load_file(tmp_path / "a"), given)
    save_file(given, tmp_path / "b")
    assert alike(read(tmp_path / "b"), given)
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() == {"format": "pt", "by": "Grüße"}


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("__metadata__", torch.ones(1)), ("a\ud800", torch.ones(1)), ("a", torch.ones(1, dtype=torch.complex128))],
    ids=["metadata", "surrogate", "complex128"],
)
def test_what_the_format_has_not_is_refused_before_anything_is_read_or_written(
    name: str, tensor: Tensor, tmp_path: Path
) -> None:
    class Unreadable(Given):
        def get(self, name: str) -> Tensor:
            raise AssertionError(name)

    with pytest.raises(ValueError, match=r"__metadata__|surrogates not allowed|complex128"):
        write_file(Unreadable({"fine": torch.ones(1), name: tensor}), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_what_is_read_is_nobody_elses(tmp_path: Path) -> None:
    """Neither the file's, nor that of who reads it again; also where it is large."""
    given = {name: torch.ones(size) for name, size in (("small", 3), ("large", SMALL))}
    save_file(given, tmp_path / WHOLE)
    before, folder = (tmp_path / WHOLE).read_bytes(), Folder(tmp_path)
    for name in given:
        first = folder.get(name)
        first.zero_()
        assert folder.get(name).eq(1).all() and first.eq(0).all()
    assert (tmp_path / WHOLE).read_bytes() == before
    kept = folder.get("large")
    os.remove(tmp_path / WHOLE)
    assert kept.eq(1).all()


# Folders of several files ----------------------------------------------------------------------------------------------------


def sizes(folder: Path) -> dict[str, int]:
    return {
        p.name: sum(t.numel() * t.element_size() for t in load_file(p).values()) for p in folder.glob("*.safetensors")
    }


@pytest.mark.parametrize(("shard", "files"), [(1000, 1), (16, 2), (8, 4), (1, 6)])
def test_shards_and_their_index(shard: int, files: int, tmp_path: Path) -> None:
    """As others read them: every name once, in files of at most so many bytes unless one tensor alone has more."""
    given = {f"t{i}": noise((n,), torch.float16, i) for i, n in enumerate([4, 2, 2, 5, 1, 2])}
    told: list[tuple[str, int, int]] = []
    write_folder(Tensors(given), tmp_path, shard, lambda *each: told.append(each))
    assert alike(read(tmp_path), given)
    found = sizes(tmp_path)
    assert len(found) == files and sum(found.values()) == 32
    assert all(size <= shard or len(load_file(tmp_path / name)) == 1 for name, size in found.items())
    assert [name for name, _, _ in told] == list(given)
    assert [done for _, done, _ in told] == [8, 12, 16, 26, 28, 32] and {total for _, _, total in told} == {32}
    if files == 1:
        assert list(found) == [WHOLE] and not (tmp_path / INDEX).exists()
        return
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 32} and index["weight_map"].keys() == given.keys()
    assert sorted(found) == [f"model-{i + 1:05}-of-{files:05}.safetensors" for i in range(files)]
    assert all(torch.equal(load_file(tmp_path / file)[name], given[name]) for name, file in index["weight_map"].items())
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    halves = [{n: t for n, t in given.items() if int(n[1]) % 2 == odd} for odd in (0, 1)]
    for i, half in enumerate(halves):  # as the library's users write them
        save_file(half, tmp_path / f"{i}.safetensors")
    (tmp_path / INDEX).write_text(
        json.dumps({"weight_map": {n: f"{i}.safetensors" for i in (0, 1) for n in halves[i]}})
    )
    assert alike(read(tmp_path), given)


def test_a_folder_of_nothing_is_one_of_nothing(tmp_path: Path) -> None:
    write_folder(Tensors({}), tmp_path)
    assert read(tmp_path) == {} == load_file(tmp_path / WHOLE)


def test_one_file_that_has_everything_goes_before_an_index(tmp_path: Path) -> None:
    """As with those who read such folders; what remains of an earlier export is not mixed in."""
    write_folder(Tensors({"old": torch.ones(3), "older": torch.ones(3)}), tmp_path, 12)
    save_file({"new": torch.ones(1)}, tmp_path / WHOLE)
    assert Folder(tmp_path).names() == ["new"] == Folder(tmp_path / WHOLE).names()


# Damaged and hostile ---------------------------------------------------------------------------------------------------------

FINE = {"a": of([2], 0, 8), "b": of([1], 8, 12)}
DAMAGED: dict[str, Callable[[Path], object]] = {
    "empty": lambda p: p.write_bytes(b""),
    "seven bytes": lambda p: p.write_bytes(b"1234567"),
    "cut header": lambda p: assembled(p, FINE, length=1000),
    "huge header": lambda p: assembled(p, FINE, bytes(12), length=2**63),
    "largest header": lambda p: assembled(p, FINE, bytes(12), length=2**64 - 1),
    "no header": lambda p: assembled(p, b"", bytes(12)),
    "a list": lambda p: assembled(p, [1, 2], bytes(12)),
    "not json": lambda p: assembled(p, b"{'a': 1}", bytes(12)),
    "not utf-8": lambda p: assembled(p, b'{"\xff": {}}', bytes(12)),
    "nested": lambda p: assembled(p, b'{"a": ' + b"[" * 100_000, bytes(12)),
    "cut data": lambda p: assembled(p, FINE, bytes(11)),
    "more data": lambda p: assembled(p, FINE, bytes(13)),
    "overlapping": lambda p: assembled(p, {"a": of([2], 0, 8), "b": of([2], 4, 12)}, bytes(12)),
    "a hole": lambda p: assembled(p, {"a": of([1], 0, 4), "b": of([1], 8, 12)}, bytes(12)),
    "backwards": lambda p: assembled(p, {"a": of([1], 4, 0)}, bytes(4)),
    "negative": lambda p: assembled(p, {"a": of([1], -4, 0)}, bytes(4)),
    "another size": lambda p: assembled(p, {"a": of([2], 0, 4)}, bytes(4)),
    "overflowing": lambda p: assembled(p, {"a": of([2**40, 2**40], 0, 4)}, bytes(4)),
    "negative shape": lambda p: assembled(p, {"a": of([-1, -1], 0, 4)}, bytes(4)),
    "no such dtype": lambda p: assembled(p, {"a": of([1], 0, 4, "F33")}, bytes(4)),
    "no shape": lambda p: assembled(p, {"a": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4)),
    "a folder": lambda p: p.mkdir(),
    "a pipe": os.mkfifo,
    "pickle": lambda p: p.write_bytes(b"\x80\x02}q\x00." + bytes(100)),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("indexed", [False, True], ids=["whole", "indexed"])
def test_damaged_files_are_refused_with_a_sentence(
    damage: Callable[[Path], object], indexed: bool, tmp_path: Path
) -> None:
    path = tmp_path / ("x.safetensors" if indexed else WHOLE)
    damage(path)
    if indexed:
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": path.name}}))
    with pytest.raises(ValueError) as caught:
        Folder(tmp_path)
    assert str(tmp_path) in str(caught.value) and str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_any_changed_byte_of_a_header_is_refused_or_reads_what_is_there(tmp_path: Path) -> None:
    given = {"a": noise((3,), torch.float32), "b": noise((2, 2), torch.bfloat16), "c": noise((), torch.int64)}
    save_file(given, tmp_path / "a", {"about": "it"})
    whole = (tmp_path / "a").read_bytes()
    header = len(whole) - 28
    generator, refused = random.Random(0), 0
    for _ in range(300):
        changed = bytearray(whole)
        for _ in range(generator.randint(1, 2)):
            changed[generator.randrange(header)] = generator.randrange(256)
        (tmp_path / "a").write_bytes(changed)
        try:
            found = read(tmp_path / "a")
        except ValueError as error:
            refused += str(tmp_path) in str(error)
        else:
            assert sum(len(raw(t)) for t in found.values()) == 28
            refused += 0
    assert refused > 150, "else nothing was damaged"


OUTSIDE = ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "./x.safetensors", ".", ""]
INDICES = {
    "empty": "",
    "a list": "[]",
    "no map": "{}",
    "a list as map": '{"weight_map": ["a"]}',
    "numbers": '{"weight_map": {"a": 1}}',
    "nothing": '{"weight_map": {"a": null}}',
    "nested": "[" * 100_000,
    "missing file": '{"weight_map": {"a": "y.safetensors"}}',
    "missing name": '{"weight_map": {"a": "x.safetensors", "more": "x.safetensors"}}',
    "more in file": '{"weight_map": {}}',
    "zero byte": '{"weight_map": {"a": "x\\u0000.safetensors"}}',
    "surrogate": '{"weight_map": {"a": "\\ud800"}}',
    "long": json.dumps({"weight_map": {"a": "x" * 300}}),
    **{f"outside {file}": json.dumps({"weight_map": {"a": file}}) for file in OUTSIDE},
    "parent": '{"weight_map": {"a": ".."}}',
}


@pytest.mark.parametrize(
    "text", [t for k, t in INDICES.items() if k != "more in file"], ids=[k for k in INDICES if k != "more in file"]
)
def test_damaged_indices_are_refused_with_a_sentence(text: str, tmp_path: Path) -> None:
    folder = tmp_path / "sub" / "folder"
    for place in (folder, folder.parent, folder / "sub"):  # what is outside could be read, and is not
        place.mkdir(parents=True, exist_ok=True)
        save_file({"a": torch.ones(1)}, place / "x.safetensors")
    (folder / INDEX).write_text(text)
    with pytest.raises(ValueError) as caught:
        Folder(folder)
    assert str(folder) in str(caught.value) and str(caught.value).endswith(".") and "\n" not in str(caught.value)
    (folder / INDEX).write_bytes(b'{"weight_map": "\xff"}')
    with pytest.raises(ValueError, match="not an index"):
        Folder(folder)


def test_names_in_two_files_or_in_other_files_than_listed(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x")
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "y")
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "x", "b": "y"}}')
    with pytest.raises(ValueError, match=r": a is in x and in y\.$"):
        Folder(tmp_path)
    (tmp_path / INDEX).write_text('{"weight_map": {"b": "y"}}')
    with pytest.raises(ValueError, match=r"do not agree on a\.$"):
        Folder(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match=f"^{path} has neither {WHOLE} nor {INDEX}.$"):
            Folder(path)


def test_types_that_are_not_read_are_told_when_they_are_asked_for(tmp_path: Path) -> None:
    """A checkpoint of which nobody needs them can be read."""
    folder = Folder(assembled(tmp_path / "a", {"x": of([2], 0, 1, "F4"), "y": of([1], 1, 5)}, bytes(5)))
    assert folder.names() == ["x", "y"] and folder.get("y").tolist() == [0]
    for ask in (folder.meta, folder.get):
        with pytest.raises(ValueError, match="x is of type F4, which is not read"):
            ask("x")


@pytest.mark.parametrize("size", [3, SMALL])
def test_a_file_that_changes_while_it_is_read(size: int, tmp_path: Path) -> None:
    save_file({"a": torch.ones(size)}, tmp_path / "a")
    folder = Folder(tmp_path / "a")
    with (tmp_path / "a").open("r+b") as file:
        file.truncate(60)
    with pytest.raises(ValueError, match="cannot be read any more"):
        folder.get("a")
    (tmp_path / "a").unlink()
    with pytest.raises(ValueError, match="cannot be read any more"):
        folder.get("a")


# Interrupted -----------------------------------------------------------------------------------------------------------------

EXPORT = {f"t{i}": torch.full((5,), float(i)) for i in range(4)}


def export(path: Path, told: Callable[[str, int, int], None] | None = None) -> None:
    with new_folder(path) as folder:
        write_folder(Tensors(EXPORT), folder, 40, told)
        (folder / "config.json").write_text("{}")


def test_a_folder_is_there_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "out"
    seen: list[bool] = []
    export(path, lambda *_: seen.append(path.exists()))
    assert seen == [False] * 4 and alike(read(path), EXPORT) and (path / "config.json").exists()
    assert os.listdir(path.parent) == ["out"], "nothing beside it"
    ordinary = tmp_path / "ordinary"
    ordinary.mkdir()
    assert path.stat().st_mode == ordinary.stat().st_mode, "others may read it as any folder"


def test_an_empty_folder_is_a_place_to_write_to_and_nothing_else_is(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    export(tmp_path / "empty")
    assert alike(read(tmp_path / "empty"), EXPORT)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "other")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    for name in ("file", "full", "link", "dangling", "empty"):
        with pytest.raises(ValueError, match=f"{name} is there already"), new_folder(tmp_path / name):
            raise AssertionError
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "full" / "x").read_text() == "mine"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_what_is_interrupted_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    for last in EXPORT:

        def told(name: str, *_: int, last: str = last) -> None:
            if name == last:
                raise error

        with pytest.raises(error):
            export(tmp_path / "out", told)
        assert not list(tmp_path.iterdir())


def test_a_file_that_is_interrupted_stays_what_it_was(tmp_path: Path) -> None:
    """Also where it is what is read: it is replaced when all of it has been."""
    save_file(EXPORT, tmp_path / "a")

    def told(name: str, *_: int) -> None:
        assert name != "t2", "no more"

    mapped = Mapped(Folder(tmp_path / "a"), Rules((rule("*", "new.*"),)))
    with pytest.raises(AssertionError, match="no more"):
        write_file(mapped, tmp_path / "a", told=lambda name, *_: told(name.removeprefix("new.")))
    assert os.listdir(tmp_path) == ["a"] and alike(read(tmp_path / "a"), EXPORT)
    write_file(mapped, tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"] and alike(read(tmp_path / "a"), {f"new.{n}": t for n, t in EXPORT.items()})


def test_who_comes_second_does_not_mix(tmp_path: Path) -> None:
    with pytest.raises(OSError), new_folder(tmp_path / "out") as late:
        (late / "x").write_text("late")
        export(tmp_path / "out")
    assert (
        os.listdir(tmp_path) == ["out"]
        and alike(read(tmp_path / "out"), EXPORT)
        and not (tmp_path / "out" / "x").exists()
    )


def in_child(act: Callable[[], object]) -> int:
    """Does this in a process of its own. Returns how that ended, as of waitpid. Threads of the parent are not there."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            act()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def killed_at(path: Path, point: int) -> None:
    """An export that is killed at the so-manyth of the points at which something is on the disk, or would be."""
    points = iter(range(100))

    def die() -> None:
        if next(points) == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(act: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(act)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            die()
            made = act(*args, **kwargs)
            die()
            return made

        return wrapped

    for name in ("mkdir", "rename", "replace", "fsync"):
        setattr(os, name, before(getattr(os, name)))
    export(path, lambda *_: die())


def test_a_killed_export_leaves_no_folder_and_is_in_nobodys_way(tmp_path: Path) -> None:
    ends = []
    for point in range(100):
        path = tmp_path / str(point) / "out"
        path.parent.mkdir()
        ended = in_child(functools.partial(killed_at, path, point))
        ends.append(ended)
        assert ended in (signal.SIGKILL, 0)
        if path.exists():
            assert alike(read(path), EXPORT) and (path / "config.json").exists(), point
        else:
            assert all(name.startswith(".out-") for name in os.listdir(path.parent))
            export(path)  # what was left behind is in nobody's way
            assert alike(read(path), EXPORT)
        if ended == 0:
            break
    assert ends[-1] == 0 and ends[:-1] == [signal.SIGKILL] * (len(ends) - 1) and len(ends) > 15


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """Files may have so many bytes and no more, as where there is no more room."""

    def export_with_little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        with pytest.raises(OSError, match="File too large"):
            export(tmp_path / "out" / "deep")
        with pytest.raises(OSError, match="File too large"):
            write_file(Tensors({"a": torch.ones(500)}), tmp_path / "file")

    assert in_child(export_with_little_room) == 0
    assert [p for p in tmp_path.rglob("*") if p.name != "out"] == []


# Memory ----------------------------------------------------------------------------------------------------------------------


def kilobytes(what: str) -> int:
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{what}:"))
    return int(line.split()[1])


def peak(act: Callable[[bool], object], folder: Path) -> float:
    """The most memory that something needs in a process of its own, in tensors of PIECE bytes. It is done with little first, as
    a child has to load anew what its parent had of Python and torch. What is freed is given back at once (-3 is how large a block
    is for that), else the gaps between the blocks of an allocator would be counted as well. The least of three: a system that takes
    idle pages from a process, which it then reads anew, can only add to it."""

    def measured() -> None:
        libc = ctypes.CDLL(None)  # earlier tests of this process may have asked it to keep freed memory
        libc.mallopt(-4, 65536)
        libc.mallopt(-3, SMALL)
        libc.malloc_trim(0)  # what is free and still there would be taken without being counted
        libc.malloc.restype = ctypes.c_void_p
        while not ctypes.c_size_t.from_address((place := libc.malloc(PIECE // 4)) - 8).value & 2:
            pass  # gaps that earlier tests have left are taken for good, and never touched, until the system gives new memory
        libc.free(ctypes.c_void_p(place))
        act(True)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM is counted anew, not from the parent's on
        before = kilobytes("VmRSS")
        act(False)
        (folder / "peak").write_text(str(kilobytes("VmHWM") - before))

    found = []
    for _ in range(3):
        assert in_child(measured) == 0
        found.append(int((folder / "peak").read_text()) * 1024 / PIECE)
    return min(found)


class Made:
    """Ten tensors that are made when they are asked for."""

    def __init__(self, size: int) -> None:
        self.size = size

    def names(self) -> list[str]:
        return [f"{kind}.{i}" for i in range(5) for kind in "ab"]

    def meta(self, name: str) -> Tensor:
        return torch.empty(self.size, dtype=torch.uint8, device="meta")

    def get(self, name: str) -> Tensor:
        return torch.full((self.size,), int(name[2:]), dtype=torch.uint8)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """100 MB in ten tensors of a folder of two files, little in another, and the peak when they were written."""
    path = tmp_path_factory.mktemp("large")

    def write(little: bool) -> None:
        shutil.rmtree(path / str(little), ignore_errors=True)
        with new_folder(path / str(little)) as folder:
            write_folder(Made(SMALL if little else PIECE), folder, 6 * PIECE)

    (path / "written").write_text(str(peak(write, path)))
    yield path
    shutil.rmtree(path)


def test_writing_takes_the_memory_of_one_tensor(large: Path) -> None:
    assert 0.7 < float((large / "written").read_text()) < 1.5


def joined(source: Folder) -> Mapped:
    size = source.meta("a.0").numel()
    return Mapped(source, Rules((rule(("a.*", "b.*"), "ab.*", Concatenate(-1, (size, size))),)))


@pytest.mark.parametrize(
    ("act", "least", "most"),
    [
        (lambda source, out: [source.get(name).max() for name in source.names()], 0.7, 1.5),
        (lambda source, out: write_file(source, out / "file"), 0.7, 1.5),
        (lambda source, out: write_file(joined(source), out / "file"), 3.5, 4.5),  # two, and what is made of them
        (lambda source, out: copies(source), 10.5, 11.5),  # which has all of them, and the last as it was read
    ],
    ids=["read", "write", "join", "copies"],
)
def test_what_was_read_is_let_go(
    act: Callable[[Folder, Path], object], least: float, most: float, large: Path, tmp_path: Path
) -> None:
    """A mapping of whole files would count everything that was ever read."""
    try:
        needed = peak(lambda little: act(Folder(large / str(little)), tmp_path), tmp_path)
        assert least < needed < most, needed
    finally:
        (tmp_path / "file").unlink(missing_ok=True)


def test_the_tables_of_dtypes_agree_with_the_library() -> None:
    """Each name once, and none that it does not know."""
    assert len(set(NAMES.values())) == len(NAMES) == len(convert.files.DTYPES)
