"""What worker processes are started with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from seallmd.config import DeviceSettings
from seallmd.errors import ConfigError
from seallmd.paths import default_state_directory
from seallmd.runtime import devices
from seallmd.runtime.devices import plan


def test_workers_are_told_the_cache(tmp_path: Path) -> None:
    """A worker without a cache directory has nowhere to compile its operations to, and runs in plain torch:
    two to three times slower, with nothing in the output to show it."""
    made = plan(DeviceSettings(kind="cpu", cpu_workers=2, cache=str(tmp_path), memory="64 MiB"))
    assert [worker.cache for worker in (*made.workers, made.host)] == [str(tmp_path)] * 3
    assert {worker.rendezvous for worker in made.workers} == {str(made.rendezvous)}


def test_memory_of_graphs_is_no_part_of_the_arena(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What graphs may take is kept out of every GPU's arena beside the reserve, and switching them off gives
    it back; the same for the choice of kernels."""
    monkeypatch.setattr(devices, "_gpu_names", lambda: ["NVIDIA H200"] * 2)
    monkeypatch.setattr(devices, "_torch_has_cuda", lambda: True)
    common = {"cache": str(tmp_path), "reserve": "1 GiB"}
    first, second = plan(DeviceSettings(**common, graphs="256 MiB")).workers
    assert (first.device, second.device, second.name) == ("cuda:0", "cuda:1", "gpu1")
    assert (first.reserve_bytes, first.graph_bytes, first.kernels) == (
        (1 << 30) + (256 << 20),
        256 << 20,
        True,
    )
    (plain, _) = plan(DeviceSettings(**common, graphs="0 B", kernels="torch")).workers
    assert (plain.reserve_bytes, plain.graph_bytes, plain.kernels) == (1 << 30, 0, False)


@pytest.mark.parametrize("libraries", [["libtorch_cpu.so"], ["libtorch_cpu.so", "libtorch_cuda.so"], None])
def test_a_torch_without_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, libraries: list[str] | None
) -> None:
    """On a machine with GPUs it is said at the start: workers would only end and be started again."""
    package = tmp_path / "torch"
    (package / "lib").mkdir(parents=True)
    for library in libraries or ():
        (package / "lib" / library).touch()
    if libraries is None:  # built by somebody else, with its libraries elsewhere
        (package / "lib").rmdir()
    spec = SimpleNamespace(origin=str(package / "__init__.py"))
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda _: spec)
    monkeypatch.setattr(devices, "_gpu_names", lambda: ["NVIDIA H200"])
    if libraries == ["libtorch_cpu.so"]:
        with pytest.raises(ConfigError, match="knows no CUDA"):
            plan(DeviceSettings(cache=str(tmp_path)))
    else:
        assert plan(DeviceSettings(cache=str(tmp_path))).workers[0].device == "cuda:0"
    assert plan(DeviceSettings(kind="cpu", cache=str(tmp_path))).workers[0].device == "cpu"


@pytest.mark.parametrize(
    ("named", "seen"),
    [
        (None, ["0", "1", "2"]),
        ("2, 0", ["2", "0"]),
        ("GPU-b,0", ["1", "0"]),
        ("1,7,0", ["1"]),
        ("", []),
        ("-1", []),
        ("nonsense", []),
        ("MIG-x", ["part"]),
    ],
)
def test_gpus_that_are_hidden_get_no_worker(
    monkeypatch: pytest.MonkeyPatch, named: str | None, seen: list[str]
) -> None:
    """Such a worker would not find its GPU, end, and be started again for ever."""
    machine = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 3,
        "nvmlDeviceGetHandleByIndex": str,
        "nvmlDeviceGetName": str,
        "nvmlDeviceGetUUID": lambda handle: f"GPU-{'abc'[int(handle)]}1",
        "nvmlDeviceGetHandleByUUID": {"MIG-x": "part"}.__getitem__,
    }
    for name, function in machine.items():
        monkeypatch.setattr(devices.pynvml, name, function)
    if named is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert devices._gpu_names() == seen


def test_the_host_process_is_told_its_cache_of_images(tmp_path: Path) -> None:
    """Without it every restart builds every image again."""
    made = plan(DeviceSettings(kind="cpu", cache=str(tmp_path), memory="64 MiB", image_cache="3 MiB"))
    assert made.host.image_cache_bytes == 3 << 20
    assert plan(DeviceSettings(kind="cpu", memory="64 MiB", image_cache="0 B")).host.image_cache_bytes == 0


def test_an_arena_without_a_block_is_refused(tmp_path: Path) -> None:
    """Its worker would die at each start, and be started again for ever; nor is "0 B" the default."""
    for memory in ("0 B", "100 KiB"):
        with pytest.raises(ConfigError, match="do not hold a single block of 512 KiB"):
            plan(DeviceSettings(kind="cpu", cache=str(tmp_path), memory=memory))
    assert plan(DeviceSettings(kind="cpu", cache=str(tmp_path), host_memory="0 B")).host_bytes == 0


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A container's made-up user is told what to set, in one line."""

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    with pytest.raises(ConfigError, match=r"set \[devices\] cache"):
        plan(DeviceSettings(kind="cpu", memory="64 MiB"))
    with pytest.raises(ConfigError, match=r"set \[batches\] directory"):
        default_state_directory()
    assert plan(DeviceSettings(kind="cpu", memory="64 MiB", cache=str(tmp_path))).cache == tmp_path
