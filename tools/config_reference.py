"""Writes docs/configuration.md, the reference of seallmd.toml, from the types that read it.

    python tools/config_reference.py            # write it
    python tools/config_reference.py --check    # exit 1 when it is not what it would write

What a field means is said once, in the docstring of its struct ("field: what it means.").
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect

from seallmd.api.keys import Key
from seallmd.config import LIVE, Config

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

HEAD = """# The configuration: seallmd.toml

Written by `tools/config_reference.py` from the types that read the file: change those, then run it again.

The file is TOML. A field that is not known here, or is out of range, is refused with file and line;
`seallmd --check --config FILE` only looks. Sizes are written "512 KiB", "2 GiB". Names of files are relative
to this one; `~` is the home directory. A minimal file:

```toml
[[service]]
name = "smollm"
model = "models/smollm2-135m-instruct"
```

SIGHUP and `seallmctl reload` read the file again. **live** fields, and services, groups and API keys, then
change at once; whoever is being served is not cut off: a service that was removed, or whose model, dtype,
context, tensor_parallel or devices changed, first ends the requests that it has. The others are named and
wait for a restart. A wrong file changes nothing; the log and `seallmctl reload` say where it is wrong.
"""

GROUPS = """
Services that may not be on one device, for example two that must not slow each other down, and one that is to
have its device to itself:

```toml
[[group]]
services = ["chat", "code"]
share_members = false

[[group]]
services = ["judge"]
share_others = false
```
"""

KEYS = """## The file of API keys

`[http] keys` names it; else systemd's credential `api-keys` is taken (`LoadCredential=api-keys:PATH`). Others
must not be able to read it. It is read again with the configuration. Without any, nobody needs a key.

```toml
[[key]]
name = "alice"
key = "sk-7d1e0c5b9f2a4836"      # openssl rand -hex 16
tier = "priority"

[[key]]
name = "ci"
sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"   # printf %s KEY | sha256sum
models = ["small-*"]
requests_per_minute = 60
tokens_per_minute = 100000
```
"""

NOTES = {"group": GROUPS}


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    own = [field for field in msgspec.structs.fields(Config) if _struct_of(field.type) is None]
    parts.append("## At the top of the file\n\n" + _table(Config, [field.name for field in own], ""))
    for field in msgspec.structs.fields(Config):
        struct = _struct_of(field.type)
        if struct is not None:
            title = f"[[{field.name}]]" if _is_list(field.type) else f"[{field.name}]"
            names = [f.name for f in msgspec.structs.fields(struct)]
            prefix = "" if _is_list(field.type) else f"{field.name}."
            parts.append(f"## {title}\n\n{_intro(struct)}{_table(struct, names, prefix)}")
            parts.append(NOTES.get(field.name, "").lstrip("\n"))
    names = [field.name for field in msgspec.structs.fields(Key)]
    parts.append(KEYS + "\n" + _table(Key, names, ""))
    return "\n".join(part for part in parts if part)


def _is_list(kind: Any) -> bool:
    return isinstance(inspect.type_info(kind), inspect.VarTupleType)


def _struct_of(kind: Any) -> type[msgspec.Struct] | None:
    """The struct that a field holds, or holds a list of."""
    info = inspect.type_info(kind)
    if isinstance(info, inspect.VarTupleType):
        info = info.item_type
    return info.cls if isinstance(info, inspect.StructType) else None


def _intro(struct: type[msgspec.Struct]) -> str:
    """What the docstring says before it comes to fields, unless that is only the table's name."""
    first = (struct.__doc__ or "").strip().splitlines()[0]
    said = re.sub(r"^(One|The) `[^`]+` table[:.]?\s*", "", first)
    return f"{said[0].upper()}{said[1:]}\n\n" if said else ""


def _table(struct: type[msgspec.Struct], names: list[str], prefix: str) -> str:
    meanings = dict(_meanings(struct))
    lines = ["| field | kind | default | meaning |", "| --- | --- | --- | --- |"]
    for field in msgspec.structs.fields(struct):
        if field.name in names:
            live = "**live** " if prefix + field.name in LIVE else ""
            cells = (
                f"`{field.name}`",
                _kind(field.type),
                _default(field),
                live + meanings.get(field.name, ""),
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|").strip() for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _meanings(struct: type[msgspec.Struct]) -> Iterator[tuple[str, str]]:
    """Fields and what the docstring says of them: "a: text. b, c: text." until the next field begins."""
    text = " ".join((struct.__doc__ or "").split())
    name = "(?:" + "|".join(sorted(struct.__struct_fields__, key=len, reverse=True)) + ")"
    begins = list(re.finditer(rf"(?:^|(?<=[.;:] ))({name}(?:, {name})*): ", text))
    for begin, next_ in zip(begins, [*begins[1:], None], strict=False):
        meaning = text[begin.end() : next_.start() if next_ else len(text)].strip(" ;")
        for field in begin[1].split(", "):
            yield field, meaning


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "needed"
    value = field.default if field.default is not msgspec.NODEFAULT else ()
    return f"`{msgspec.json.encode(value).decode()}`"


def _kind(kind: Any) -> str:
    return _words(inspect.type_info(kind))


def _words(info: inspect.Type) -> str:
    match info:
        case inspect.BoolType():
            return "bool"
        case inspect.LiteralType(values):
            return ", ".join(f'"{value}"' for value in values)
        case inspect.IntType() | inspect.FloatType():
            return ("int" if isinstance(info, inspect.IntType) else "number") + _range(info)
        case inspect.VarTupleType(item):
            return f"list of {_words(item)}"
        case _:
            return "string"


def _range(info: inspect.IntType | inspect.FloatType) -> str:
    low = "" if info.ge is None else f" {info.ge:g}"
    low = low if info.gt is None else f" above {info.gt:g}"
    high = "" if info.le is None else f" to {info.le:,.0f}" if info.le >= 1000 else f" to {info.le:g}"
    return low + (high if info.lt is None else f" below {info.lt:g}")


def main() -> int:
    """Write the page, or look whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when it is out of date")
    wanted = page()
    if parser.parse_args().check:
        return 0 if PAGE.exists() and PAGE.read_text(encoding="utf-8") == wanted else 1
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
