"""Write an output folder in processes that are killed at each change of the file system: ``killed_writers.py FOLDER``.

Prints JSON: per kind of folder, per kill, what lay there right after it and what after the next process has looked.
"""

import importlib
import json
import os
import signal
import sys
import types
from pathlib import Path

package = types.ModuleType("hf_ortho")  # whose own modules would take seconds to import
package.__path__ = [str(Path(__file__).parents[1] / "hf_ortho")]
sys.modules["hf_ortho"] = package
folders = importlib.import_module("hf_ortho.folders")
assert not {"torch", "transformers", "huggingface_hub"} & sys.modules.keys()

CHANGES = ("mkdir", "rename", "replace", "unlink", "rmdir")
OPTIONS = {"new": {}, "empty": {}, "overwritten": {"overwrite": True}, "training": {"beside": True}}


def write(folder, version, options):
    with folders.OutputFolder(folder, **options).writing() as draft:
        for name in ("config.json", "model.safetensors", "1_Pooling/config.json", f"{version}/only"):
            (draft / name).parent.mkdir(exist_ok=True)
            (draft / name).write_text(version)


def prepare(kind, folder):
    folder.parent.mkdir(parents=True)
    if kind == "empty":
        folder.mkdir()
    if kind in ("overwritten", "training"):
        write(folder, "old", OPTIONS[kind])
    if kind == "training":
        (folder / "checkpoint-2").mkdir()
        (folder / "checkpoint-2" / "optimizer.pt").write_text("moments")


def kill_at(call):
    def patch(name):
        original = getattr(os, name)

        def changing(*args, **kwargs):
            count[0] += 1
            if count[0] == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(os, name, changing)

    count = [0]
    for name in CHANGES:
        patch(name)


def seen(folder):
    """All files of the parent but the manifests, and its folders; with their content."""
    return {
        str(p.relative_to(folder.parent)): p.read_text() if p.is_file() else None
        for p in sorted(folder.parent.rglob("*"))
        if p.name != folders.MANIFEST
    }


def look_again(folder, options):
    try:
        folders.OutputFolder(folder, **options)
    except folders.OutputError as error:
        return str(error)
    return ""


found = {}
for kind, options in OPTIONS.items():
    found[kind], status, call = [], None, 0
    while status != 0:
        call += 1
        folder = Path(sys.argv[1], kind, str(call), "out")
        prepare(kind, folder)
        child = os.fork()
        if not child:
            kill_at(call)
            write(folder, "new", options)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.wait()[1])
        left = seen(folder)
        said = look_again(folder, options)
        found[kind].append({"status": status, "left": left, "then": seen(folder), "said": said})
print(json.dumps(found))
