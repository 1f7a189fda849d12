"""The host process: probes models and keeps their images in shared memory.

Owns the jobs and which models are known. Downloads and conversions run in one thread beside the others, so
that a slow network holds up nobody else. A bad model costs its own service and nothing more. Must not know
devices or requests.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from seallmd.core.messages import (
    BuildImage,
    DropImage,
    Hello,
    ImageFailed,
    ImageReady,
    JobProgress,
    Message,
    Ping,
    Pong,
    Probe,
    Probed,
    ProbeFailed,
    Shutdown,
    ToHost,
    WorkerSettings,
)
from seallmd.errors import ModelRefused
from seallmd.files import remove_partials
from seallmd.worker.channel import Channel, Closed
from seallmd.worker.image import Image
from seallmd.worker.image_cache import ImageCache
from seallmd.worker.plausible import check_files
from seallmd.worker.probe import Probed as Model
from seallmd.worker.probe import probe
from seallmd.worker.process import begin, one_line, tell
from seallmd.worker.resolve import fetch, local_directory, with_tokenizer

_PROGRESS_SECONDS = 0.2


@dataclass(frozen=True)
class Fetched:
    """A fetch has ended, with a directory or with the reason why not. Comes from the fetch thread."""

    wanted: Probe
    directory: Path | None
    reason: str = ""


class Host:
    """Everything the host process does, without the process.

    send: takes messages, from any thread. post: brings an item from the fetch thread to `handle`.
    """

    def __init__(
        self, settings: WorkerSettings, send: Callable[[Message], None], post: Callable[[Fetched], None]
    ) -> None:
        self._settings = settings
        self._send = send
        self._post = post
        self._models: dict[str, Model] = {}
        self._images: dict[str, Image] = {}
        self._cache = _image_cache(settings)
        self._wanted: dict[str, Probe] = {}
        self._fetched: dict[Probe, Path] = {}  # until the daemon asks again
        self._fetches: queue.SimpleQueue[Probe] = queue.SimpleQueue()
        # It lives as long as the process: the kernel ends a conversion with the thread that started it.
        threading.Thread(target=self._fetch_all, name="fetch", daemon=True).start()

    def handle(self, item: Probe | BuildImage | DropImage | Ping | Fetched) -> None:
        """Carry out one job; its result, good or bad, goes to `send`."""
        match item:
            case Probe():
                self._wanted[item.service] = item
                self._find(item)
            case Fetched():
                if self._wanted.get(item.wanted.service) is not item.wanted:
                    return  # the service was probed anew meanwhile, with another model
                if item.directory is None:
                    self._send(ProbeFailed(item.wanted.service, item.reason))
                else:
                    self._fetched[item.wanted] = item.directory
                    self._progress(item.wanted.service)("fetched", 0, 0)
            case BuildImage():
                self._build(item)
            case DropImage():
                self._drop_image(item.service)
            case Ping():
                self._send(Pong())

    def _find(self, wanted: Probe) -> None:
        try:
            directory = self._fetched.pop(wanted, None) or local_directory(wanted.model)
        except ModelRefused as error:
            self._send(ProbeFailed(wanted.service, str(error)))
            return
        if directory is None:
            self._progress(wanted.service)("queue", 0, 0)
            self._fetches.put(wanted)
        else:
            self._probe(wanted, directory)

    def _probe(self, wanted: Probe, directory: Path) -> None:
        service, settings = wanted.service, self._settings
        try:
            check_files(directory)
            complete = with_tokenizer(directory, settings.cache)
            model = probe(complete, wanted.dtype, wanted.context)
        except Exception as error:  # noqa: BLE001 - no model may end the process that serves the others
            self._send(ProbeFailed(service, one_line(error)))
            return
        self._models[service] = model
        self._send(Probed(service, str(complete), model.shape))

    def _build(self, wanted: BuildImage) -> None:
        started, service = time.perf_counter(), wanted.service
        try:
            model = self._known(wanted)
            held = self._images.get(service)
            if held is not None and (held.model is not model or held.ranks != wanted.ranks):
                self._drop_image(service)
                held = None
            progress = partial(self._progress(service), "read")
            image = held or Image(service, model, wanted.ranks, progress, self._cache)
        except Exception as error:  # noqa: BLE001 - as above
            self._send(ImageFailed(service, one_line(error)))
            return
        self._images[service] = image
        self._send(ImageReady(service, image.path, image.bytes_, time.perf_counter() - started))

    def _known(self, wanted: BuildImage) -> Model:
        """The probed model; probed again where this process has not done it (it was restarted)."""
        model = self._models.get(wanted.service)
        if model is None or not _same(model, wanted):
            directory = Path(wanted.directory)
            if not wanted.directory or not directory.is_dir():
                raise ModelRefused("the model was not probed")
            model = probe(directory, wanted.dtype, wanted.context)
            self._models[wanted.service] = model
        return model

    def _drop_image(self, service: str) -> None:
        image = self._images.pop(service, None)
        if image is not None:
            image.close()

    def _fetch_all(self) -> None:
        while True:
            wanted = self._fetches.get()
            try:
                directory = fetch(wanted.model, self._settings.cache, self._progress(wanted.service))
                fetched = Fetched(wanted, directory)
            except Exception as error:  # noqa: BLE001 - as above
                fetched = Fetched(wanted, None, one_line(error))
            self._post(fetched)

    def _progress(self, service: str) -> Callable[[str, int, int], None]:
        """A function that tells the daemon how far a job is, a few times a second at most."""
        latest = 0.0

        def progress(stage: str, done: int, total: int) -> None:
            nonlocal latest
            now = time.monotonic()
            if done == 0 or done == total or now - latest >= _PROGRESS_SECONDS:
                latest = now
                self._send(JobProgress(service, stage, done, total))

        return progress


def _image_cache(settings: WorkerSettings) -> ImageCache | None:
    """None where it is off, and for GPUs: the kernel page-locks anonymous files, but not those of a disk."""
    if not settings.cache or not settings.image_cache_bytes or settings.device != "cpu":
        return None
    directory = Path(settings.cache) / "images"
    return ImageCache(directory, settings.image_cache_bytes, tell)


def _same(model: Model, wanted: BuildImage) -> bool:
    if not wanted.directory:  # whatever was probed last
        return True
    known = (str(model.checkpoint.directory), model.shape.dtype, model.shape.context)
    return known == (wanted.directory, wanted.dtype, wanted.context)


def run(settings_json: bytes, sock: socket.socket) -> None:
    """Serve until Shutdown or the end of the socket. Entry of a spawned process, called like `main.run`."""
    settings = begin(settings_json)
    for name in remove_partials(Path(settings.cache)) if settings.cache else ():
        tell(f"host: removed {name}, which was never finished")
    channel = Channel(sock, ToHost)
    host = Host(settings, channel.send, channel.post)
    try:
        channel.send(Hello(os.getpid(), "host", 0))
        while True:
            item = channel.get()
            if isinstance(item, Shutdown):
                return
            if item is not None:
                host.handle(item)
    except Closed as end:
        if end.__cause__ is not None and not isinstance(end.__cause__, OSError):
            raise
