"""Single files: whole or as before, with the mode that the user wants."""

import contextlib
import errno
import os

import pytest

from hf_ortho.errors import OutputError
from hf_ortho.files import check_file, explain, written
from hf_ortho.folders import OutputFolder


def contents(folder):
    """All files of a folder with their text."""
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_a_file_is_whole_or_as_before(tmp_path):
    path = tmp_path / "table.md"
    for error in (None, KeyboardInterrupt, OSError):
        with contextlib.nullcontext() if error is None else pytest.raises((error, OutputError)), written(path) as draft:
            assert draft.suffix == ".md"
            draft.write_text("half" if error else "whole")
            if error:
                raise error
        assert contents(tmp_path) == {"table.md": "whole"}


@pytest.mark.parametrize("dangling", [False, True])
def test_a_linked_file_is_followed(tmp_path, dangling):
    if not dangling:
        (tmp_path / "data").write_text("old")
    (tmp_path / "link").symlink_to("data")
    with written(tmp_path / "link") as draft:
        draft.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "data").read_text() == "new"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("x" * 256, os.strerror(errno.ENAMETOOLONG)),
        ("a\0b", "null"),
        ("missing/file", "missing does not exist"),
        ("file/below", "file does not exist"),
        ("folder", "is a folder; name a file"),
        ("pipe", "is not a regular file"),
    ],
)
def test_files_that_cannot_be(tmp_path, name, reason):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for use in (check_file, lambda path: written(path).__enter__()):
        with pytest.raises(OutputError, match=reason):
            use(f"{tmp_path}/{name}")
    assert contents(tmp_path) == {"file": "kept"}


def test_a_file_with_a_long_name(tmp_path):
    name = "x" * 250 + ".png"
    with written(tmp_path / name) as draft:
        draft.write_text("new")
    assert contents(tmp_path) == {name: "new"}


@pytest.mark.parametrize("name", ["mine.png", "config.json"])
def test_a_file_written_into_a_folder_is_not_overwritten_with_it(tmp_path, name):
    with OutputFolder(tmp_path / "model").writing() as draft:
        (draft / "config.json").write_text("old")
    with written(tmp_path / "model" / name) as draft:
        draft.write_text("by written")
    with pytest.raises(OutputError, match=f"{name} in it was"):
        OutputFolder(tmp_path / "model", overwrite=True)
    assert (tmp_path / "model" / name).read_text() == "by written"


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_the_umask_counts_for_files(tmp_path, umask):
    def write_privately():
        with written(tmp_path / "file") as draft:
            draft.unlink()
            os.close(os.open(draft, os.O_CREAT | os.O_WRONLY, 0o600))
        return (tmp_path / "file").stat().st_mode & 0o777

    assert write_privately() == 0o666 & ~umask
    (tmp_path / "file").chmod(0o640)
    assert write_privately() == 0o640


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("\n  first\nsecond"), "first"),
        (ValueError("these differ:\n\n  a and b\nc"), "these differ: a and b"),
        (ValueError("nothing follows:"), "nothing follows:"),
        (KeyError(), "KeyError"),
    ],
)
def test_an_explanation_is_the_first_line_that_says_something(error, expected):
    assert explain(error) == expected
