"""Output folders: whole or as before, whatever is there, and whenever the process dies."""

import contextlib
import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_ortho import drafts
from hf_ortho.errors import OutputError
from hf_ortho.files import MANIFEST
from hf_ortho.folders import READY, OutputFolder

NEW = {"config.json": "new", "sub/weights": "new"}


def contents(folder):
    """All files of a folder with their text, but for the manifest."""
    return {
        p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST
    }


def fill(folder, content=NEW):
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def write(folder, content=NEW, error=None, **options):
    with OutputFolder(folder, **options).writing() as draft:
        fill(draft, content)
        if error is not None:
            raise error


def refusal(*args, **options):
    """The one sentence with which a folder is refused."""
    with pytest.raises(OutputError) as error:
        OutputFolder(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(params=["absent", "empty", "written"])
def target(request, tmp_path):
    """A folder to write with ``overwrite``, in a parent of its own."""
    path = tmp_path / "parent" / "model"
    path.parent.mkdir()
    if request.param == "empty":
        path.mkdir()
    if request.param == "written":
        write(path, {"config.json": "old", "sub/weights": "old", "gone/shard": "old"})
    return path


# ---- writing -------------------------------------------------------------------------------------------------------


def test_the_new_content_takes_the_place_of_the_old(target):
    write(target, overwrite=True)
    assert contents(target) == NEW
    assert {p.name for p in target.iterdir()} == {"config.json", "sub", MANIFEST}
    assert list(target.parent.iterdir()) == [target]
    sums = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in NEW.items()}
    assert json.loads((target / MANIFEST).read_text())["files"] == sums


def test_parents_are_made_and_removed_again(tmp_path):
    with pytest.raises(RuntimeError):
        write(tmp_path / "a" / "b" / "model", error=RuntimeError())
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "a" / "b" / "model")
    assert contents(tmp_path) == {f"a/b/model/{name}": text for name, text in NEW.items()}


@pytest.mark.parametrize("error", [RuntimeError, OSError, KeyboardInterrupt, SystemExit, MemoryError])
def test_an_exception_leaves_all_as_it_was(target, error):
    existed, before = target.exists(), contents(target)
    with pytest.raises(OutputError if error is OSError else error):
        write(target, error=error("No space left on device"), overwrite=True)
    assert (target.exists(), contents(target)) == (existed, before)
    assert list(target.parent.iterdir()) == ([target] if existed else [])


def test_a_full_disk_is_named(tmp_path):
    with pytest.raises(OutputError, match=r"^output folder \S+model: .*nothing was changed: No space left on device$"):
        write(tmp_path / "model", error=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def _changes(monkeypatch, hit):
    """Call ``hit(n, change)`` for the n-th change of the file system, with the change as a function."""
    count = [0]
    for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
        original = getattr(os, name)

        def changing(*args, _original=original, **kwargs):
            count[0] += 1
            return hit(count[0], lambda: _original(*args, **kwargs))

        monkeypatch.setattr(os, name, changing)


@pytest.mark.parametrize("when", ["instead", "after"])
def test_an_interruption_at_any_change_leaves_the_old_or_the_new(tmp_path, monkeypatch, when):
    """A second attempt to move the files comes after the interruption, so nothing is left for the next process."""
    old, seen, call = {"config.json": "old", "gone/shard": "old"}, set(), 0
    while "new uninterrupted" not in seen:
        call += 1
        folder = tmp_path / str(call) / "model"
        write(folder, old)

        def interrupt(number, change, call=call):
            try:
                return None if (number, when) == (call, "instead") else change()
            finally:
                if number == call:
                    raise KeyboardInterrupt

        interrupted = ""
        with monkeypatch.context() as patch:
            output = OutputFolder(folder, overwrite=True)
            try:
                with output.writing() as draft:
                    fill(draft)
                    _changes(patch, interrupt)
            except KeyboardInterrupt:
                interrupted = "interrupted"
        OutputFolder(folder, overwrite=True)
        assert contents(folder.parent) in ({f"model/{k}": v for k, v in content.items()} for content in (old, NEW))
        assert list(folder.parent.iterdir()) == [folder]
        seen.add(f"{contents(folder)['config.json']} {interrupted or 'uninterrupted'}")
    assert seen == {"old interrupted", "new interrupted", "new uninterrupted"}


def test_a_failure_while_files_are_moved_is_mended_by_the_next_run(tmp_path, monkeypatch, caplog):
    write(tmp_path / "model", {"config.json": "old"})
    replace = os.replace

    def fail(source, to):
        if to.name == "weights":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, to)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OutputError, match=f"the next run moves the rest.*{os.strerror(errno.EIO)}"):
        write(tmp_path / "model", overwrite=True)
    monkeypatch.undo()
    assert contents(tmp_path / "model") == {f"{READY}/{name}": text for name, text in NEW.items()}
    assert "pass --overwrite" in refusal(tmp_path / "model")
    assert contents(tmp_path / "model") == NEW
    assert "it is complete now" in caplog.text


@pytest.fixture(scope="module")
def kills(tmp_path_factory):
    """What ``killed_writers.py`` found."""
    script = Path(__file__).with_name("killed_writers.py")
    command = [sys.executable, str(script), str(tmp_path_factory.mktemp("killed"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", ["new", "empty", "overwritten", "training"])
def test_killed_at_any_change(kills, kind):
    def all_of(version):
        names = ("config.json", "model.safetensors", "1_Pooling/config.json", f"{version}/only")
        return {f"out/{name}": version for name in names}

    old = all_of("old") if kind in ("overwritten", "training") else {}
    foreign = {"out/checkpoint-2/optimizer.pt": "moments"} if kind == "training" else {}
    ends = []
    for kill in kills[kind]:
        then = {name: text for name, text in kill["then"].items() if text is not None}
        assert then in (old | foreign, all_of("new") | foreign)
        folders = {str(parent) for name in then for parent in Path(name).parents} - {"."}
        assert folders | {"out"} == kill["then"].keys() - then.keys() | {"out"}  # no draft, and no empty folder
        ends.append("new" if "out/new/only" in then else "old")
        # What can be loaded before the next process looks is whole too.
        version = kill["left"].get("out/config.json")
        assert version is None or all_of(version).items() <= kill["left"].items()
    assert ends == sorted(ends, reverse=True)  # old until some kill, new from then on
    assert set(ends) == {"old", "new"}
    assert [kill["status"] for kill in kills[kind]] == [-9] * (len(ends) - 1) + [0]


# ---- what is there -------------------------------------------------------------------------------------------------


def test_a_folder_of_others_is_never_replaced(tmp_path):
    fill(tmp_path / "home", {"thesis.tex": "years", ".ssh/id_rsa": "secret"})
    for overwrite in (False, True):
        assert ".ssh/id_rsa in it was not written by hf_ortho" in refusal(tmp_path / "home", overwrite=overwrite)
    assert contents(tmp_path / "home") == {"thesis.tex": "years", ".ssh/id_rsa": "secret"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda folder: (folder / "notes.txt").write_text("mine"), "notes.txt in it was not written by hf_ortho"),
        (lambda folder: (folder / "sub" / "mine").write_text("mine"), "sub/mine in it was not written by hf_ortho"),
        (lambda folder: (folder / "mine").mkdir(), "mine/ in it was not written by hf_ortho"),
        (lambda folder: (folder / "link").symlink_to("/"), "link in it was not written by hf_ortho"),
        (lambda folder: (folder / "config.json").write_text("mine"), "config.json in it was changed since"),
        (lambda folder: (folder / MANIFEST).write_text("[" * 10**5), "config.json in it was not written by hf_ortho"),
        (lambda folder: (folder / MANIFEST).write_text('{"files": []}'), "config.json in it was not written"),
    ],
)
def test_what_was_added_or_changed_is_not_replaced(tmp_path, change, reason):
    write(tmp_path / "model")
    change(tmp_path / "model")
    before = contents(tmp_path)
    assert reason in refusal(tmp_path / "model", overwrite=True)
    assert contents(tmp_path) == before


def test_what_was_written_before_needs_the_flag(tmp_path):
    write(tmp_path / "model")
    assert "pass --overwrite" in refusal(tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()
    write(tmp_path / "model", {"other": "new"}, overwrite=True)
    assert contents(tmp_path / "model") == {"other": "new"}


def test_a_manifest_cannot_name_files_elsewhere(tmp_path):
    (tmp_path / "victim").write_text("mine")
    write(tmp_path / "model")
    sums = {"../victim": hashlib.sha256(b"mine").hexdigest(), str(tmp_path / "victim"): ""}
    manifest = json.loads((tmp_path / "model" / MANIFEST).read_text())
    manifest["files"] |= sums
    (tmp_path / "model" / MANIFEST).write_text(json.dumps(manifest))
    write(tmp_path / "model", {"config.json": "newer"}, overwrite=True)
    assert contents(tmp_path) == {"victim": "mine", "model/config.json": "newer"}


# ---- which folders -------------------------------------------------------------------------------------------------


def test_places_that_are_never_written(tmp_path, monkeypatch):
    home, source, data = tmp_path / "users" / "me", tmp_path / "par" / "src", tmp_path / "data.txt"
    for folder in (home, source, tmp_path / "here" / "deep"):
        folder.mkdir(parents=True)
    data.write_text("")
    (tmp_path / "alias").symlink_to(source)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path / "here" / "deep")
    for overwrite in (False, True):
        for beside in (False, True):
            options = {"overwrite": overwrite, "beside": beside, "keep": [str(source), str(data), None, "me/hub-model"]}
            assert "is empty" in refusal("", **options)
            assert "is the current folder" in refusal(".", **options)
            assert "contains the current folder" in refusal("..", **options)
            assert "contains the input" in refusal("/", **options)
            assert "contains the current folder" in refusal("/", overwrite=overwrite, beside=beside)
            assert "is the home folder" in refusal(home, **options)
            assert "contains the home folder" in refusal(home.parent, **options)
            assert f"is the input {source}" in refusal(source, **options)
            assert f"is the input {source}" in refusal(tmp_path / "alias", **options)
            assert "contains the input" in refusal(source.parent, **options)
            assert "is a file" in refusal(data, **options)
    assert f"contains the input {data}" in refusal(tmp_path, overwrite=True, keep=[f"{tmp_path}/*.txt"])
    OutputFolder(source / "converted", keep=[source, f"{tmp_path}/*.txt"])
    OutputFolder(home / "model")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("x" * 256, os.strerror(errno.ENAMETOOLONG)),
        ("missing/" + "x" * 256, os.strerror(errno.ENAMETOOLONG)),
        ("/".join(["x" * 200] * 21), os.strerror(errno.ENAMETOOLONG)),
        ("a\0b", "cannot hold a NUL character"),
        ("file/below", "file is a file"),
        ("loop", os.strerror(errno.ELOOP)),
    ],
)
def test_names_that_cannot_be(tmp_path, name, reason):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "loop").symlink_to("loop")
    assert reason in refusal(f"{tmp_path}/{name}", overwrite=True)
    assert reason in refusal(f"{tmp_path}/{name}", beside=True)
    assert contents(tmp_path) == {"file": "kept"}


def test_the_longest_names(tmp_path):
    write(tmp_path / ("x" * 255))
    assert contents(tmp_path / ("x" * 255)) == NEW


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_is_followed(tmp_path, dangling):
    (tmp_path / "disk").mkdir()
    if not dangling:
        (tmp_path / "disk" / "model").mkdir()
    (tmp_path / "out").symlink_to("disk/model")
    write(tmp_path / "out")
    write(tmp_path / "out", overwrite=True)
    assert os.readlink(tmp_path / "out") == "disk/model"
    assert contents(tmp_path / "disk") == {f"model/{name}": text for name, text in NEW.items()}
    assert {p.name for p in tmp_path.iterdir()} == {"disk", "out"}


def test_a_parent_that_cannot_be_written(tmp_path, monkeypatch):
    """An existing folder is filled, as a mount point is; beside it nothing is written, let alone renamed."""
    (tmp_path / "mount").mkdir()
    mkdir, rename = os.mkdir, os.rename

    def only_below(change):
        def changing(path, *args, **kwargs):
            if not str(path).startswith(f"{tmp_path}/mount/"):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return change(path, *args, **kwargs)

        return changing

    monkeypatch.setattr(os, "mkdir", only_below(mkdir))
    monkeypatch.setattr(os, "rename", only_below(rename))
    monkeypatch.setattr(os, "access", lambda path, mode: str(path).startswith(f"{tmp_path}/mount"))
    write(tmp_path / "mount")
    write(tmp_path / "mount", overwrite=True)
    assert contents(tmp_path) == {f"mount/{name}": text for name, text in NEW.items()}
    assert f"{tmp_path} cannot be written" in refusal(tmp_path / "other")


# ---- several processes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [NEW, {"config.json": "late"}])
def test_two_write_the_same_folder(target, content):
    """The second to end is refused, be its result the same, and what the first has written stays."""
    late, early = (OutputFolder(target, overwrite=True) for _ in range(2))
    with contextlib.ExitStack() as stack:
        fill(stack.enter_context(late.writing()), content)
        with early.writing() as draft:
            fill(draft)
        with pytest.raises(OutputError, match="another process wrote it in the meantime"):
            stack.close()
    assert contents(target) == NEW
    assert list(target.parent.iterdir()) == [target]


def test_a_file_that_comes_meanwhile_is_kept(target):
    with contextlib.ExitStack() as stack:
        fill(stack.enter_context(OutputFolder(target, overwrite=True).writing()))
        fill(target, {"thesis.tex": "years"})
        with pytest.raises(OutputError, match=r"thesis.tex in it was not written|wrote it in the meantime"):
            stack.close()
    assert contents(target)["thesis.tex"] == "years"
    assert contents(target).get("config.json") != "new"


def test_a_file_that_is_changed_meanwhile_is_set_aside(tmp_path, caplog):
    write(tmp_path / "model", {"config.json": "old", "gone": "old"})
    with OutputFolder(tmp_path / "model", overwrite=True).writing() as draft:
        fill(draft)
        fill(tmp_path / "model", {"config.json": "mine", "gone": "mine"})
    assert contents(tmp_path / "model") == NEW | {".config.json.old": "mine", "gone": "mine"}
    assert "is kept as '.config.json.old'" in caplog.text


def test_a_draft_that_is_being_written_is_left_alone(target):
    with OutputFolder(target, overwrite=True).writing() as draft:
        fill(draft)
        OutputFolder(target, overwrite=True)
    assert contents(target) == NEW


def test_without_locks_leftovers_are_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(drafts, "fcntl", None)
    (tmp_path / "model" / ".hf_ortho-0123abcd").mkdir(parents=True)
    (tmp_path / "model" / ".hf_ortho-0123abcd" / MANIFEST).write_text("")
    write(tmp_path / "model")
    assert "/.hf_ortho-0123abcd' may be a leftover draft" in caplog.text
    assert contents(tmp_path / "model") == NEW
    fill(tmp_path / "model" / READY, {MANIFEST: "{}"})
    assert f"move the files of {READY} into it" in refusal(tmp_path / "model")


def test_only_own_drafts_are_removed(tmp_path):
    fill(tmp_path / "model" / ".hf_ortho-notes", {"mine.txt": "mine"})
    fill(tmp_path / "model" / ".hf_ortho-output", {MANIFEST: json.dumps({"files": {}})})
    (tmp_path / "model" / ".hf_ortho-0123abcd").symlink_to(tmp_path)
    write(tmp_path / "model")
    assert (tmp_path / "model" / ".hf_ortho-notes" / "mine.txt").read_text() == "mine"
    assert (tmp_path / "model" / ".hf_ortho-output" / MANIFEST).exists()
    fill(tmp_path / "model" / READY, {"mine.txt": "mine"})
    assert "was not written by hf_ortho" in refusal(tmp_path / "model", overwrite=True)
    for manifest in ("", "[]", '{"files": []}', '{"files": 1, "replaces": {"sub/weights": 1}}', "[" * 10**5):
        fill(tmp_path / "model" / READY, {MANIFEST: manifest})
        assert "was not written by hf_ortho" in refusal(tmp_path / "model", overwrite=True)
    assert (tmp_path / "model" / READY / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("in_the_way", ["link", "file"])
def test_files_are_not_moved_through_a_link(tmp_path, in_the_way, caplog):
    (tmp_path / "home").mkdir()
    (tmp_path / "model").mkdir()
    if in_the_way == "link":
        (tmp_path / "model" / "sub").symlink_to(tmp_path / "home")
    else:
        (tmp_path / "model" / "sub").write_text("mine")
    manifest = json.dumps({"files": {}, "replaces": {}})
    fill(tmp_path / "model" / READY, {"sub/authorized_keys": "theirs", MANIFEST: manifest})
    refusal(tmp_path / "model")
    assert list((tmp_path / "home").iterdir()) == []
    assert (tmp_path / "model" / "sub" / "authorized_keys").read_text() == "theirs"
    assert "is kept as '.sub.old'" in caplog.text


@pytest.mark.parametrize("old", ["shard", "shard/1"])
def test_a_file_becomes_a_folder_or_back(tmp_path, old, caplog):
    (new,) = {"shard", "shard/1"} - {old}
    write(tmp_path / "model", {"config.json": "old", old: "old"})
    write(tmp_path / "model", {"config.json": "new", new: "new"}, overwrite=True)
    assert contents(tmp_path / "model") == {"config.json": "new", new: "new"}
    assert json.loads((tmp_path / "model" / MANIFEST).read_text()).get("replaces", {}) == {}
    assert caplog.text == ""


@pytest.mark.parametrize("name", [MANIFEST, f"{READY}/{MANIFEST}"])
def test_a_folder_in_the_place_of_a_manifest(tmp_path, name):
    (tmp_path / "model" / name).mkdir(parents=True)
    for options in ({"overwrite": True}, {"beside": True}):
        assert f"{name.split('/')[0]} in it " in refusal(tmp_path / "model", **options)
    assert (tmp_path / "model" / name).is_dir()


# ---- the folder of a training --------------------------------------------------------------------------------------


def test_beside_other_files(tmp_path, caplog):
    folder = tmp_path / "run"
    kept = {"checkpoint-2/config.json": "2", "runs/events": "log", "train.log": "mine"}
    fill(folder, kept | {"README.md": "mine"})
    output = OutputFolder(folder, beside=True)
    fill(folder, {"model.safetensors": "of a save", "tokenizer.json": "mine"})  # the first by the training itself
    new = NEW | {"README.md": "card", "model.safetensors": "final", "tokenizer.json": "its"}
    with output.writing(made=["README.md", "model.safetensors", "optimizer.pt"]) as draft:
        fill(draft, new)
    kept |= {".README.md.old": "mine", ".tokenizer.json.old": "mine"}
    assert contents(folder) == kept | new
    assert "is kept as '.README.md.old'" in caplog.text
    assert "is kept as '.tokenizer.json.old'" in caplog.text
    write(folder, {"config.json": "newer"}, beside=True)  # the rest of the model goes with the old one
    assert contents(folder) == kept | {"config.json": "newer"}
    (folder / "config.json").write_text("mine")
    assert "config.json in it was changed since" in refusal(folder, beside=True)


# ---- modes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_the_umask_counts(tmp_path, umask, target):
    with OutputFolder(target, overwrite=True).writing() as draft:
        fill(draft)
        os.chmod(draft / "sub" / "weights", 0o600)  # as safetensors does
    modes = {p.name: p.stat().st_mode & 0o777 for p in target.rglob("*")}
    assert modes["config.json"] == modes["weights"] == modes[MANIFEST] == 0o666 & ~umask
    assert modes["sub"] == 0o777 & ~umask


def test_a_private_file_stays_private(tmp_path):
    write(tmp_path / "model")
    for name in NEW:
        (tmp_path / "model" / name).chmod(0o600)
    write(tmp_path / "model", {"config.json": "newer", "sub/weights": "newer"}, overwrite=True)
    assert [(tmp_path / "model" / name).stat().st_mode & 0o777 for name in NEW] == [0o600, 0o600]
