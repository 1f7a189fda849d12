"""Host images on disk: a restart takes them, and never one that is not exactly what would be built."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from seallmd.worker import image as image_module
from seallmd.worker.image import Image
from seallmd.worker.image_cache import ImageCache
from seallmd.worker.probe import Probed, probe
from tests.worker.helpers import save_tiny

LIMIT = 64 << 20


class Shelf:
    """A cache, what it said, and the images that were built for want of a cached one."""

    def __init__(self, directory: Path, limit: int = LIMIT) -> None:
        self.directory, self.said = directory, list[str]()
        self._cache = ImageCache(directory, limit, self.said.append)

    def image(self, probed: Probed, ranks: int = 1) -> tuple[bytes, bool]:
        """The image as a worker reads it, and whether it was built. Returns when it is kept."""
        image = Image("s", probed, ranks, lambda *_: None, self._cache)
        if image.keeping is not None:
            image.keeping.join()
        built = os.readlink(image.path).startswith("/memfd:")
        content = Path(image.path).read_bytes()[: image.bytes_]
        image.close()
        return content, built

    def files(self) -> list[Path]:
        return sorted(file for file in self.directory.iterdir() if file.name != "lock")


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "images")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "m", "qwen3")


def test_a_restart_takes_it(shelf: Shelf, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process, later: the same bytes, without reading the checkpoint."""
    built = shelf.image(probe(model, "float32", 0))
    assert built[1]
    monkeypatch.setattr(image_module, "_fill", None)
    assert Shelf(shelf.directory).image(probe(model, "float32", 0)) == (built[0], False)
    assert shelf.said == []


def test_a_directory_that_may_only_be_read(
    shelf: Shelf, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that came with a container: its images serve, and one that is damaged is built in memory."""
    built = shelf.image(probe(model, "float32", 0))[0]

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as frozen:
        frozen.setattr(os, "utime", refuse)
        frozen.setattr(Path, "unlink", refuse)
        assert shelf.image(probe(model, "float32", 0)) == (built, False)
        _flip(shelf.files()[0])
        assert shelf.image(probe(model, "float32", 0)) == (built, True)


def test_what_it_is_made_from_counts(shelf: Shelf, model: Path) -> None:
    """Another dtype, another number of ranks: another image."""
    assert shelf.image(probe(model, "float32", 0))[1]
    assert shelf.image(probe(model, "bfloat16", 0))[1]
    assert shelf.image(probe(model, "float32", 0), ranks=2)[1]
    assert not shelf.image(probe(model, "bfloat16", 0))[1]
    assert len(shelf.files()) == 3


def test_a_changed_checkpoint_is_built_anew(shelf: Shelf, model: Path) -> None:
    """Whatever its size: the file is another one."""
    old, _ = shelf.image(probe(model, "float32", 0))
    weights = load_file(model / "model.safetensors")
    save_file(
        {name: tensor + 1 for name, tensor in weights.items()}, model / "model.safetensors", {"format": "pt"}
    )
    new, built = shelf.image(probe(model, "float32", 0))
    assert built
    assert new != old


def test_a_link_is_what_it_leads_to(shelf: Shelf, model: Path, tmp_path: Path) -> None:
    """Directories of links (completed models, the hub's cache) find the image of the files behind them."""
    shelf.image(probe(model, "float32", 0))
    (tmp_path / "links").mkdir()
    for file in model.iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    assert not shelf.image(probe(tmp_path / "links", "float32", 0))[1]


def _cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _empty(file: Path) -> None:
    os.truncate(file, 0)


def _without_first_byte(file: Path) -> None:
    file.write_bytes(file.read_bytes()[1:])


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _bad_seal(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"crc":', b'"crc";'))


def _open_to_others(file: Path) -> None:
    file.chmod(0o666)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_cut, "cut short"),
        (_empty, "cut short"),
        (_without_first_byte, "cut short"),
        (_flip, "checksum"),
        (_bad_seal, "cut short"),
        (_open_to_others, "others may write"),
    ],
)
def test_a_damaged_one_is_built_anew(
    shelf: Shelf, model: Path, damage: Callable[[Path], None], said: str
) -> None:
    """Never served, said in one line, and whole again the next time."""
    probed = probe(model, "float32", 0)
    right, _ = shelf.image(probed)
    damage(shelf.files()[0])
    assert shelf.image(probed) == (right, True)
    assert len(shelf.said) == 1
    assert said in shelf.said[0]
    assert shelf.image(probed) == (right, False)


def test_one_under_another_name_is_refused(shelf: Shelf, model: Path) -> None:
    """A file says what it is, whatever it is called."""
    shelf.image(probe(model, "float32", 0))
    (one,) = shelf.files()
    right, _ = shelf.image(probe(model, "bfloat16", 0))
    other = next(file for file in shelf.files() if file != one)
    shutil.copyfile(one, other)
    assert shelf.image(probe(model, "bfloat16", 0)) == (right, True)
    assert "another model's" in shelf.said[0]


def test_a_killed_writer_leaves_nothing_for_long(shelf: Shelf, model: Path) -> None:
    """What it wrote has another name, is never read, and goes when the next image is kept."""
    shelf.directory.mkdir()
    torn = shelf.directory / "0123.partial"
    torn.write_bytes(b"half an image")
    shelf.image(probe(model, "float32", 0))
    assert not torn.exists()
    assert [file.suffix for file in shelf.files()] == [".image"]


def test_the_longest_unused_goes_first(model: Path, tmp_path: Path) -> None:
    """Within the limit; one that is larger than the limit is not kept at all."""
    size = len(Shelf(tmp_path / "measure").image(probe(model, "float32", 0))[0])
    shelf = Shelf(tmp_path / "images", 2 * size + size // 2)
    kinds = [("float32", 0), ("bfloat16", 0), ("float16", 0)]
    for number, (dtype, context) in enumerate(kinds[:2]):
        shelf.image(probe(model, dtype, context))
        for file in shelf.files():
            if file.stat().st_mtime_ns > 10 * 10**9:
                os.utime(file, (number, number))
    assert not shelf.image(probe(model, "float32", 0))[1]  # used just now
    shelf.image(probe(model, "float32", 0), ranks=2)
    assert not shelf.image(probe(model, "float32", 0))[1]
    assert shelf.image(probe(model, "bfloat16", 0))[1], "it was the longest unused"

    small = Shelf(tmp_path / "small", size - 1)
    assert small.image(probe(model, "float32", 0))[1]
    assert small.image(probe(model, "float32", 0))[1]
    assert not small.directory.exists()


def test_a_disk_that_is_full_costs_the_cache_only(
    shelf: Shelf, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image is served all the same, nothing torn stays, and the reason is said."""

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("seallmd.worker.image_cache.os.write", full)
    content, built = shelf.image(probe(model, "float32", 0))
    assert built
    assert torch.frombuffer(bytearray(content), dtype=torch.uint8).any()
    assert shelf.files() == []
    assert shelf.said == ["an image cannot be cached: No space left on device"]
