import io

import pytest

from hf_ortho.cli import console as cli
from hf_ortho.text import visible

UNSAFE = {
    "\x1b]0;title\x07": r"\x1b]0;title\x07",
    "\x1b[31mred": r"\x1b[31mred",
    "a\rb": r"a\rb",
    "\x9b2J": r"\x9b2J",
    "\u202egnp": r"\u202egnp",
    "\udcff": r"\udcff",
}
PLAIN = ["[/b]", "[link=http://x]", ":smile:", "naïve ✓\tb", "line\nline", "\\x1b", "[bold]x"]


@pytest.mark.parametrize("text", UNSAFE)
def test_controls_are_made_visible(text):
    assert visible(text) == UNSAFE[text]


@pytest.mark.parametrize("text", PLAIN)
def test_other_text_stays(text):
    assert visible(text) == text


@pytest.fixture
def screen(monkeypatch):
    """What the console prints, as to a terminal with colours."""
    out = io.StringIO()
    monkeypatch.setattr(cli, "console", cli.PlainConsole(soft_wrap=True, file=out, force_terminal=True, width=200))
    monkeypatch.setattr(cli.PlainConsole, "file", property(lambda self: out, lambda self, file: None))
    return out


def _status(text):
    with cli.console.status(text):
        pass


def _progress(text):
    with cli.progress(text):
        pass


WAYS = {
    "print": lambda text: cli.console.print(text),
    "rule": lambda text: cli.console.rule(text),
    "table": lambda text: cli.table("", ["column"], [[text]]),
    "title": lambda text: cli.table(text, ["column"], [["cell"]]),
    "column": lambda text: cli.table("", [text], [["cell"]]),
    "status": _status,
    "progress": _progress,
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_the_screen(screen, way):
    texts = dict.fromkeys(["[/b]", ":smile:", "[link=http://x]a[/link]"])
    for text, shown in (texts | UNSAFE).items():
        WAYS[way](text)
        assert (shown or text) in screen.getvalue()
        if shown:
            assert text not in screen.getvalue()
        screen.seek(0)
        screen.truncate()
