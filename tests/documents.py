"""Run the blocks of a Markdown document: its Python here, its shell commands in bash.

bash finds ``hf-ortho``, ``python``, ``pip`` and ``make`` of this module first. They ask this process to do the work,
which has imported everything, and print what it answers.
"""

import contextlib
import dataclasses
import io
import json
import os
import re
import runpy
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
FENCE = re.compile(r"^(?:<!-- not run: (?P<why>[^\n]+) -->\n)?```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
LONG = re.compile(r"--max-steps \d{3,}")  # trainings end earlier here
SHIM = """#!{python} -ISs
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as one:
    one.connect({address!r})
    one.sendall(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:], os.getcwd()]).encode() + b"\\n")
    code, out, err = json.loads(one.makefile().read())
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, its first line in the file, and why it does not run, if so."""

    kind: str
    text: str
    line: int
    why: str


def blocks(file: Path) -> list[Block]:
    """The blocks of ``bash`` and ``python`` in a document."""
    text = file.read_text(encoding="utf-8")
    found = [
        Block(match["kind"], match["text"], text[: match.start("text")].count("\n") + 1, match["why"] or "")
        for match in FENCE.finditer(text)
    ]
    return [block for block in found if block.kind in ("bash", "python")]


def run(file: Path, folder: Path, hf_ortho_command) -> None:
    """Run the blocks of ``file`` in ``folder``, in their order; the Python ones share their names."""
    names: dict = {"__name__": "__main__"}
    for block in blocks(file):
        if block.why:
            continue
        where = f"{file.name}, line {block.line}"
        if block.kind == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile("\n" * block.line + block.text, str(file), "exec"), names)
        else:
            code, printed = _bash(LONG.sub("--max-steps 20", block.text), folder, hf_ortho_command)
            assert code == 0, f"{where}: exit code {code}\n{block.text}\n{printed}"


def _bash(text: str, folder: Path, hf_ortho_command) -> tuple[int, str]:
    """The exit code and the output of a shell script that runs in ``folder``."""
    with tempfile.TemporaryDirectory() as tools, socket.socket(socket.AF_UNIX) as server:
        for name in DOES:
            shim = Path(tools, name)
            shim.write_text(SHIM.format(python=sys.executable, address=f"{tools}/socket"))
            shim.chmod(0o755)
        server.bind(f"{tools}/socket")
        server.listen()
        server.settimeout(0.05)
        environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
        command = ["bash", "-euo", "pipefail", "-c", text]
        with (
            open(f"{tools}/printed", "w+", encoding="utf-8") as printed,
            subprocess.Popen(command, cwd=folder, env=environment, stdout=printed, stderr=printed) as shell,
        ):
            try:
                while shell.poll() is None:
                    with contextlib.suppress(TimeoutError):
                        _answer(server.accept()[0], hf_ortho_command)
            finally:
                shell.kill()  # otherwise it would wait for an answer that failed
            printed.seek(0)
            return shell.returncode, printed.read()


def _answer(connection: socket.socket, hf_ortho_command) -> None:
    with connection:
        tool, *argv, folder = json.loads(connection.makefile().readline())
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            answer = DOES[tool](argv, hf_ortho_command)
        connection.sendall(json.dumps(answer).encode())


def _hf_ortho(argv, hf_ortho_command):
    ran = hf_ortho_command(*argv)
    return ran.code, ran.out, ran.err


def _python(argv, hf_ortho_command):
    """A script."""
    out, code = io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        try:
            runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except Exception:
            code = 1
            traceback.print_exc()
    return code, out.getvalue(), ""


def _pip(argv, hf_ortho_command):
    """Nothing is installed, but the extras must exist."""
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    named = {extra for word in argv for extra in re.findall(r"\[([\w,-]+)\]", word) for extra in extra.split(",")}
    unknown = [extra for extra in named if not re.search(rf"^{extra} = \[", project, re.M)]
    return len(unknown), "", f"no extra {', '.join(unknown)}\n" if unknown else ""


def _make(argv, hf_ortho_command):
    """Nothing is made, but the target must exist."""
    ran = subprocess.run(["/usr/bin/env", "make", "-n", *argv], cwd=REPOSITORY, capture_output=True, text=True)
    return ran.returncode, "", ran.stderr


DOES = {"hf-ortho": _hf_ortho, "python": _python, "pip": _pip, "make": _make}
