"""Seeded damage to the JSON and safetensors files of a checkpoint."""

import copy
import json
import random
from pathlib import Path

DEEP = 3000
ODD = [
    *(None, True, False, 0, 1, -1, 2, 1.5, -0.0, 1e300, float("nan"), float("inf")),
    *("", "x", "hermite_4", "tropical_4", "gelu", "hermite_²", f"hermite_{'9' * 5000}", "٣", "²", "a.b", "F32"),
    *("\x1b[31m\x00\r\n", "\ud800", "a" * 20_000, "$\\frac{$", "`|<b>[x](http://y)", "../..", "/", "[a-z]+", "("),
    *([], {}, [None], ["x"], [[]], {"": None}, {"domain": 3}, [1, 2], [0.5, -0.5], {"a": {"b": []}}, [{"module": "x"}]),
]
BIG = [10**9, 10**30, -(2**63), 2**64]


def nodes(value, path=()):
    """Every (path, value) in a JSON value."""
    yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from nodes(item, (*path, key))


def damaged(rng: random.Random, plain):
    """A copy of a JSON value with one to three values replaced, removed, renamed or nested."""
    plain = copy.deepcopy(plain)
    for _ in range(rng.choice([1, 1, 2, 3])):
        path, old = rng.choice(list(nodes(plain)))
        if not path:
            continue
        *parents, key = path
        holder = plain
        for parent in parents:
            holder = holder[parent]
        kind = rng.randrange(7)
        if kind == 0:
            holder.pop(key)
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice([str(odd) for odd in ODD])[:5000]] = holder.pop(key)
        elif kind == 2:
            holder[key] = [old]
        elif kind == 3:
            holder[key] = {"x": old}
        elif kind == 4:
            holder[key] = rng.choice(BIG)
        else:
            holder[key] = copy.deepcopy(rng.choice(ODD))
    return plain


def damaged_text(rng: random.Random, plain) -> bytes:
    """The bytes of a damaged JSON file."""
    text = json.dumps(damaged(rng, plain)).encode()
    kind = rng.randrange(12)
    if kind == 0:
        return text[: rng.randrange(len(text))]
    if kind == 1:
        return b"[" * DEEP + text
    if kind == 2:
        at = rng.randrange(len(text))
        return text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :]
    if kind == 3:  # a key twice
        return text.rstrip(b"}") + b', "layers": 3, "weight_map": [], "architectures": {}}'
    if kind == 4:
        return text.replace(b": ", b": " + b'{"a": ' * DEEP, 1)
    if kind == 5:
        return text.replace(b"4", b"9" * 5000, 1)
    return text


def damaged_weights(rng: random.Random, content: bytes) -> bytes:
    """The bytes of a safetensors file with another header, or of another length."""
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    kind = rng.randrange(8)
    if kind == 0:
        return content[: rng.randrange(len(content))]
    if kind == 1:
        size = rng.choice([0, 1, size - 1, size + 1, len(content), 2**31, 2**63, 2**64 - 1])
        return size.to_bytes(8, "little") + content[8:]
    if kind == 2:
        name = rng.choice([name for name in header if name != "__metadata__"])
        entry = header[name]
        start, end = entry["data_offsets"]
        entry |= rng.choice(
            [
                {"dtype": rng.choice(["F64", "BF16", "I64", "C64", "F8_E4M3", "F4", "BOOL", "", "f32", "X" * 9999])},
                {"shape": rng.choice([[], [0], [-1], [2**62, 4], [2**32, 2**32], [1] * 999, ["2"], None, 2])},
                {"data_offsets": rng.choice([[0, 0], [end, start], [start, 2**63], [-1, end], [0, end], [], None])},
            ]
        )
    elif kind == 3:
        name = rng.choice(list(header))
        header[rng.choice([str(odd) for odd in ODD])] = header.pop(name)
    elif kind == 4:
        header["__metadata__"] = rng.choice(ODD)
    elif kind == 5:
        layer = rng.choice([".².", f".{'9' * 5000}.", ".\x1b.", ".$\\frac{$.", "..", "."])
        header = {name.replace(".0.", layer): entry for name, entry in header.items()}
    else:
        header = damaged(rng, header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def damage(rng: random.Random, folder: Path, names: list[str]) -> str:
    """Damage one of the files ``names`` of a folder; returns its name."""
    name = rng.choice(names)
    content = (folder / name).read_bytes()
    weights = name.endswith(".safetensors")
    (folder / name).write_bytes(damaged_weights(rng, content) if weights else damaged_text(rng, json.loads(content)))
    return name
