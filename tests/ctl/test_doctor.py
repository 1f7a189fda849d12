"""seallmctl doctor: each finding has a remedy, and no daemon is needed."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from seallmd.api.control import ControlServer
from seallmd.ctl import doctor
from tests.ctl.conftest import FakeNode
from tests.ctl.test_seallmctl import run

SERVICE = '[[service]]\nname = "a"\nmodel = "models/a"\n'


def write(directory: Path, text: str) -> Path:
    (directory / "seallmd.toml").write_text(text)
    return directory / "seallmd.toml"


def levels(findings: list[doctor.Finding]) -> dict[str, str]:
    return {finding.check: finding.level for finding in findings}


async def test_without_a_daemon(tmp_path: Path) -> None:
    """A sound configuration: nothing is bad, and it says how to start."""
    model = tmp_path / "models" / "a"
    model.mkdir(parents=True)
    (model / "model.safetensors").touch()
    config = write(tmp_path, '[http]\nport = 0\n[devices]\nkind = "cpu"\n' + SERVICE)
    none = tmp_path / "none.sock"
    code, out, err = await run("--socket", none, "doctor", "--config", config)
    assert (code, err) == (0, "")
    assert "start it" in out
    code, out, _ = await run("--socket", none, "doctor", "--config", config, "--json")
    assert code == 0
    found = {finding["check"]: finding["level"] for finding in json.loads(out)}
    assert found == {
        "configuration": "ok",
        "daemon": "warn",
        "devices": "ok",
        "memory": "ok",
        "model": "ok",
    }


async def test_everything_wrong(tmp_path: Path) -> None:
    """Exit code 1; the file's own error, the missing model and the port that is taken, each with a remedy."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = write(tmp_path, f"nonsense = 1\n[http]\nport = {port}\n" + SERVICE)
        (tmp_path / "models").mkdir()
        code, out, _ = await run("--socket", tmp_path / "none.sock", "doctor", "--config", config, "--json")
    assert code == 1
    findings = {finding["check"]: finding for finding in json.loads(out)}
    assert [findings[check]["level"] for check in ("configuration", "port", "model")] == ["bad"] * 3
    assert f"{config}:1:" in findings["configuration"]["text"]
    assert "in use" in findings["port"]["text"]
    assert "models/a is not there" in findings["model"]["text"]
    assert all(finding["remedy"] for finding in findings.values() if finding["level"] != "ok")


async def test_with_a_daemon(server: ControlServer, control: Path, node: FakeNode, tmp_path: Path) -> None:  # noqa: ARG001
    """It answers: its lost device is bad, and so is HTTP that does not answer where it should."""
    server.http = (f"unix:{tmp_path / 'nobody.sock'}",)
    code, out, _ = await run("--socket", control, "doctor", "--config", write(tmp_path, SERVICE), "--json")
    assert code == 1
    found = json.loads(out)
    assert any(f["check"] == "daemon" and f["level"] == "ok" for f in found)
    assert any("device 1" in f["text"] and f["level"] == "bad" for f in found)
    assert any(f["check"] == "http" and f["level"] == "bad" for f in found)
    assert not any(f["check"] == "port" for f in found), "its own port is in use, of course"


@pytest.mark.parametrize(
    ("kind", "gpus", "level"),
    [("cpu", None, "ok"), ("auto", None, "ok"), ("cuda", None, "bad"), ("cuda", 0, "bad")],
)
def test_devices(kind: str, gpus: int | None, level: str) -> None:
    """GPUs that are configured and not there keep the daemon from starting."""
    finding = doctor._gpu_finding(kind, gpus)
    assert finding.level == level
    assert bool(finding.remedy) == (level == "bad")


@pytest.mark.parametrize(("available", "level"), [(5 << 30, "ok"), (2 << 30, "warn")])
def test_memory(available: int, level: str) -> None:
    """Arenas and host images together must fit."""
    config = {"devices": {"kind": "cpu", "cpu_workers": 2, "memory": "1 GiB", "host_memory": "1536 MiB"}}
    assert [finding.level for finding in doctor._memory(config, available)] == [level]


def test_models(tmp_path: Path) -> None:
    """Directories, files and names on Hugging Face are told apart as the daemon does."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.gguf").touch()
    found = [doctor._model("s", model, tmp_path) for model in ("./empty", "x.gguf", "org/name", "./gone")]
    assert [finding.level for finding in found] == ["bad", "ok", "warn", "bad"]
    assert "Hugging Face" in found[2].text


def test_no_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is a warning: the daemon may have been given another one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "CONFIGURATIONS", (Path("seallmd.toml"),))
    finding, config, _ = doctor._configuration(None)
    assert (finding.level, config) == ("warn", {})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[devices]\ncpu_workers = "two"\n' + SERVICE, "cpu_workers"),
        ("[http]\nport = 99999\n" + SERVICE, "65535"),
        ('[http]\nhost = "a..b"\n' + SERVICE, "'a..b' is no name of a host"),
        (SERVICE.replace("models/a", "~nosuchuser/a"), "a: ~nosuchuser/a cannot be looked at"),
        (SERVICE.replace("models/a", "m" * 300), "cannot be looked at: File name too long"),
    ],
)
def test_what_is_wrong_is_told_and_no_end(tmp_path: Path, text: str, words: str) -> None:
    """A wrong configuration is what the doctor is called for; the first mistake must not end the visit."""
    findings = doctor.examine(tmp_path / "none.sock", write(tmp_path, text))
    assert any(finding.level == "bad" and words in finding.text for finding in findings), findings
    assert findings[-1].check == "model"
