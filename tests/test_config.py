"""seallmd.toml: what is right is read, what is wrong is told with file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from seallmd.config import Size, load
from seallmd.errors import ConfigError

SERVICE = '[[service]]\nname = "m"\nmodel = "models/m"\n'


def write(directory: Path, text: str) -> Path:
    path = directory / "seallmd.toml"
    path.write_text(text)
    return path


def test_a_small_file_has_defaults(tmp_path: Path) -> None:
    """Name and model are all that must be said."""
    (tmp_path / "models").mkdir()
    config = load(write(tmp_path, SERVICE))
    (service,) = config.service
    assert service.model == str(tmp_path / "models" / "m")
    assert (service.dtype, service.pinned, service.preload) == ("auto", False, False)
    assert (config.http.host, config.http.port) == ("127.0.0.1", 8000)


def test_a_hugging_face_id_stays_one(tmp_path: Path) -> None:
    """Only what lies beside the file is a path."""
    config = load(write(tmp_path, '[[service]]\nname = "m"\nmodel = "org/model"\n'))
    assert config.service[0].model == "org/model"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", None, "nothing to serve"),
        ("x = [", "1", "Invalid"),
        (SERVICE + "colour = 1\n", "4", "colour"),
        (SERVICE + "[[group]]\nservices = ['m', 'n']\n", "5", "'n'"),
        (SERVICE + "[[group]]\nservices = []\n", "5", "length"),
        (SERVICE + 'dtype = "int3"\n', "4", "int3"),
        (SERVICE + "\n" + SERVICE, "6", "used twice"),
        ("[http]\nhost = 'x'\nport = 99999\n" + SERVICE, "3", "65535"),
        ("[htp]\nport = 1\n" + SERVICE, "1", "htp"),
        ("[devices]\nmemory = 'much'\n" + SERVICE, "2", "no size"),
        ("[devices]\n\nblock = '1 B'\n" + SERVICE, "3", "4 KiB"),
        ("[devices]\nblock = '270001 B'\n" + SERVICE, "2", "multiple of 256"),
        ("[devices]\ncache = '~nosuchuser/x'\n" + SERVICE, None, "~nosuchuser/x: there is no such home"),
        (SERVICE.replace("models/m", "~nosuchuser/m"), None, "there is no such home"),
        (SERVICE + "[policy]\nscheduler = 'magic'\n", "5", "magic"),
        ('[[service]]\nname = "a/../b"\nmodel = "x"\n', "2", "regex"),
        (SERVICE + '[[service]]\nname = "n"\n', "4", "model"),
        (SERVICE + '[[service]]\nname = "n"\nmodel = "y"\n# pinned\npinned = 3\n', "8", "bool"),
    ],
)
def test_errors_say_where(tmp_path: Path, text: str, line: str | None, words: str) -> None:
    """File, line, and what is wrong, in one line."""
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}:" if line else f"{path}:"), message
    assert words in message
    assert "\n" not in message


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    """No traceback for a wrong path."""
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "none.toml")


def test_sizes() -> None:
    """Bytes as people write them."""
    assert Size("2 GiB").bytes_ == 2 << 30
    assert Size("1.5 MiB").bytes_ == 3 << 19
    assert Size("").bytes_ == 0


def test_exit_codes_are_documented() -> None:
    """Scripts rely on the page: what the code says and what it says are the same."""
    from seallmd.ctl import main

    page = (Path(__file__).parents[1] / "docs" / "exit-codes.md").read_text(encoding="utf-8")
    section = page.split("## seallmd\n")[0]
    told = {
        int(line.split("|")[1])
        for line in section.splitlines()
        if line.startswith("| ") and line[2].isdigit()
    }
    codes = {value for name, value in vars(main).items() if name.startswith("EXIT_")}
    assert told == codes | {0}


def test_files_are_found_beside_the_configuration(tmp_path: Path) -> None:
    """Wherever the daemon was started from; what is not configured stays empty."""
    http = load(write(tmp_path, '[http]\nkeys = "keys.toml"\ntls_key = "/etc/key.pem"\n' + SERVICE)).http
    assert (http.keys, http.tls_key) == (str(tmp_path / "keys.toml"), "/etc/key.pem")
    assert http.tls_certificate == ""


def test_every_name_of_a_file_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `cache = "~/x"` made a directory called ~ wherever the daemon was started."""
    monkeypatch.setenv("HOME", "/home/me")
    text = '[devices]\ncache = "~/x"\n[journal]\npath = "run.journal"\n[control]\nsocket = "c.sock"\n'
    config = load(write(tmp_path, text + '[http]\nsocket = "~/h.sock"\n' + SERVICE))
    assert config.devices.cache == "/home/me/x"
    assert config.journal.path == str(tmp_path / "run.journal")
    assert (config.control.socket, config.http.socket) == (str(tmp_path / "c.sock"), "/home/me/h.sock")


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    """It is told with its service, like any other model that is not there, and does not end the daemon."""
    name = "m" * 300
    assert load(write(tmp_path, SERVICE.replace("models/m", name))).service[0].model == name
