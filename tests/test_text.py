import io
import json
import math

import pytest
from markdown_it import MarkdownIt

from hf_ortho.cli import console as cli
from hf_ortho.cli import progress
from hf_ortho.text import (
    change,
    code,
    code_block,
    digits,
    duration,
    interval,
    json_values,
    markdown,
    markdown_table,
    number,
    one_line,
    some,
    visible,
)

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


def test_text_on_one_line():
    assert one_line("a\nb\tc\x1b[m [x] ✓") == r"a\nb\tc\x1b[m [x] ✓"


@pytest.fixture
def screen(monkeypatch):
    """What the console prints, as to a terminal with colors."""
    out = io.StringIO()
    terminal = cli.PlainConsole(soft_wrap=True, file=out, force_terminal=True, width=200)
    for module in (cli, progress):
        monkeypatch.setattr(module, "console", terminal)
    monkeypatch.setattr(cli.PlainConsole, "file", property(lambda self: out, lambda self, file: None))
    return out


def _status(text):
    with cli.console.status(text):
        pass


def _progress(text):
    with progress.progress(text):
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


def test_a_bar_in_a_cell_of_a_table_is_escaped():
    assert markdown_table(["", "a|b"], [["1", "2"]]) == "|  | a\\|b |\n| --- | --- |\n| 1 | 2 |"


PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
MARKED = [
    *(
        "<b>x</b>",
        "<!-- x -->",
        "<http://x>",
        "[a](http://x)",
        "![a](x)",
        "[a]: http://x",
        "[ ] a",
        "&lt;b&gt;",
        "&#60;",
    ),
    *(
        "`a`",
        "``a",
        "a`",
        "```",
        "``` `` `",
        "*a* **a**",
        "_a_ __a__",
        "~~a~~",
        "$a$",
        ":a:",
        "www.x.org",
        "http://x.org",
    ),
    *("# a", "## a", "#", "- a", "-", "--", "---", "- - -", "* * *", "+ a", "1. a", "12) a", "> a", "=", "| a | b |"),
    *("\\", "\\\\", "a\\|b", "\\`a\\`", "a\\", "|", "\\|", "`|`", "`\\|`", "<b\\>", "\\<b>", "a  b"),
]


def text_of(document):
    """The text of a document of one paragraph, and the kinds of its parts."""
    first, inline, last = PARSER.parse(document)
    assert (first.type, last.type) == ("paragraph_open", "paragraph_close")
    return "".join(part.content for part in inline.children), {part.type for part in inline.children}


@pytest.mark.parametrize("text", MARKED)
def test_marks_are_shown(text):
    """Exactly the text, but for spaces; in a table too, where a ``|`` is a mark as well."""
    expected = " ".join(text.split())
    found, kinds = text_of(markdown(text))
    assert (found, kinds - {"text", "text_special"}) == (expected, set())
    found, kinds = text_of(f"x {code(text)} y")
    assert found == f"x {expected} y"
    assert "code_inline" in kinds or "\\|" in text
    table = PARSER.parse(markdown_table(["h", text], [[text, code(text)], [markdown(text), "z"]]))
    cells = [token for token in table if token.type == "inline"]
    contents = ["".join(part.content for part in cell.children) for cell in cells]
    assert contents == ["h", expected, expected, expected, expected, "z"]
    assert {part.type for cell in cells for part in cell.children} <= {"text", "text_special", "code_inline"}
    (block,) = PARSER.parse(code_block(f"{text}\n{text}", "bash"))
    assert (block.type, block.info, block.content) == ("fence", "bash", f"{text}\n{text}\n")


@pytest.mark.parametrize(
    "text", ["gelu_new", "1.2e-03", "-2.90..2.96", "a (b): c, d; e'f", "x -> y +1%", "naïve ✓", "a@b"]
)
def test_plain_text_is_its_own_markdown(text):
    assert markdown(text) == text
    assert code(text) == f"`{text}`"


def test_lines_and_controls_in_markdown():
    assert markdown("a\n\n\tb") == "a b"
    assert code(" a\n\nb ") == "`a b`"
    assert markdown("\x1b[31m") == "\\\\x1b\\[31m"
    assert code("\x1b[31m") == "`\\x1b[31m`"
    assert markdown(markdown("*")) == "\\*"  # once
    assert markdown(None) == "None"


def test_what_is_not_finite_is_none_in_json():
    value = {"ends": (-math.inf, 2.0), "deep": [{"nan": math.nan}], "whole": 3, "none": None, "yes": True}
    found = json.loads(json.dumps(json_values(value), allow_nan=False))
    assert found == {"ends": [None, 2.0], "deep": [{"nan": None}], "whole": 3, "none": None, "yes": True}
    assert json_values([math.inf, 1.0], not_finite=str) == ["inf", 1.0]
    assert interval(found["ends"]) == (-math.inf, 2.0)
    assert interval([1.5, None]) == (1.5, math.inf)


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (2.0, 2.5, "+25.000%"),
        (4.0, 3.0, "-25.000%"),
        (0.0, 1.0, "-"),
        (math.inf, 1.0, "-"),
        (math.nan, 1.0, "-"),
        (-0.1, 0.7, "-"),
        (0.1, -0.1, "-"),
    ],
)
def test_a_change_in_percent(before, after, text):
    assert change(before, after) == text


@pytest.mark.parametrize(
    ("value", "spec", "text"),
    [
        (-4e-6, "+.3%", "0.000%"),
        (6e-6, "+.3%", "+0.001%"),
        (-0.0, ".2f", "0.00"),
        (-0.004, ".2f", "0.00"),
        (-0.006, ".2f", "-0.01"),
        (-0.0, "+.1e", "0.0e+00"),
        (-2e-300, "+.1e", "-2.0e-300"),
        (-math.inf, "+.1e", "-inf"),
    ],
)
def test_what_is_rounded_to_0_has_no_sign(value, spec, text):
    assert number(value, spec) == text


@pytest.mark.parametrize(
    ("seconds", "words"), [(29, "less than a minute"), (600, "about 10 min"), (9000, "about 2.5 h")]
)
def test_durations_are_rounded(seconds, words):
    assert duration(seconds) == words


def test_large_values_have_no_exponent():
    assert list(map(digits, (0.01234, 12.34, 999.4, 999.7, 25000.4))) == ["0.0123", "12.3", "999", "1000", "25000"]


def test_long_lists_are_cut():
    assert [some("abcde"[:n], 3) for n in (0, 3, 5)] == ["", "a, b, c", "a, b, c and 2 more"]
    assert some("abcde", 1, "tensors") == "a and 4 more tensors"
