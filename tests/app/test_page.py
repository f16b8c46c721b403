"""The page in headless Chromium, as a laptop and as a phone, and the Space's file."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import hf_ortho

pytestmark = pytest.mark.slow
CHROMIUM = Path("/usr/bin/chromium")
SPACE = Path(hf_ortho.__file__).parent / "app" / "space.py"
# A process of its own: Gradio leaves event loops open.
SERVE = """
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
demo = runpy.run_path(sys.argv[1], run_name="app")["demo"]
print(demo.title, demo.analytics_enabled, os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"])
from hf_ortho.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def served(converted_folder):
    """``hf-ortho app`` in a process that has run the Space's file before; its address, and what that printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-u", "-c", SERVE, SPACE, "app", "--port", port, "--model", converted_folder]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("HF_HUB_DISABLE_IMPLICIT_TOKEN", None)
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True, env=environment)
    with process:
        assert process.stdout is not None
        space, address = process.stdout.readline(), process.stdout.readline()
        yield address, space
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    assert address == f"http://127.0.0.1:{port}/ (press Ctrl-C to stop)\n"


@pytest.fixture(scope="module")
def page(served):
    """A laptop's browser window with the page, and its complaints."""
    if not CHROMIUM.exists():
        pytest.skip(f"needs {CHROMIUM}")
    sync_api = pytest.importorskip("playwright.sync_api")
    address = served[0].split()[0]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        window = browser.new_page(viewport={"width": 1366, "height": 768})
        window.set_default_timeout(30_000)
        window.complaints = []
        window.on("console", lambda m: m.type in ("error", "warning") and window.complaints.append(m.text))
        window.on("pageerror", lambda error: window.complaints.append(str(error)))
        window.on(
            "request",
            lambda r: r.url.startswith((address, "data:", "blob:")) or window.complaints.append(f"asks {r.url}"),
        )
        window.goto(address)
        window.wait_for_selector("#figures table")
        yield window
        browser.close()


def cells(page, row):
    return page.locator("#figures tr", has_text=row).locator("td").all_inner_texts()[1:]


def overflow(page):
    return page.evaluate("document.documentElement.scrollWidth - window.innerWidth")


def test_page(page, converted_folder):
    """One story in one window, since opening it is what takes the time."""
    before = cells(page, "largest error")
    assert 1e-3 < float(before[0]) < 4e-3  # hermite_8 for gelu
    page.get_by_label("fourier", exact=True).check()
    page.get_by_label("Degree").fill("3")
    page.wait_for_selector("text=--family fourier --degree 3")
    assert page.locator("#figures").is_visible()
    assert float(cells(page, "largest error")[0]) != float(before[0])
    assert page.locator(".matplotlib img").first.evaluate("image => image.naturalWidth") > 600

    for degree, sentence in (("40", "degree '40' of fourier: must be an integer from 1 to 32"), ("3", None)):
        page.get_by_label("Degree").fill(degree)
        if sentence:
            page.wait_for_selector(f"[role=alert]:has-text({sentence!r})")
            assert not page.locator("#figures").is_visible()
        else:
            page.wait_for_selector("[role=alert]", state="hidden")
    page.get_by_label("two numbers").check()
    page.get_by_label("lo", exact=True).fill("4")
    page.wait_for_selector("[role=alert]:has-text('domain from 4 to 3: lo must be at least 0.01 below hi')")
    page.get_by_label("lo", exact=True).fill("-2.5")
    page.wait_for_selector("text=--domain -2.5 3.0")
    assert [float(end) for end in cells(page, "domain")] == [-2.5, 3.0]
    page.get_by_label("Source activation").fill("relu2")
    page.get_by_label("Source activation").press("Enter")
    page.wait_for_selector("[role=alert]:has-text('relu2 has no asymptotic slope')")
    page.set_viewport_size({"width": 390, "height": 844})
    assert overflow(page) == 0

    page.get_by_role("tab", name="Checkpoint").click()
    page.wait_for_selector("text=2 activations at transformer.h.*.mlp.act, source gelu_new")
    page.wait_for_selector("#layers >> text=hermite_8 >> visible=true")
    assert overflow(page) == 0
    assert page.locator(".wide .matplotlib img").bounding_box()["x"] >= 0
    page.get_by_label("Converted model").fill(str(converted_folder.parent))
    page.get_by_role("button", name="Show").click()
    page.wait_for_selector("[role=alert]:has-text('is not a checkpoint: expected a folder with config.json')")
    assert not page.locator("#layers").is_visible()
    page.get_by_label("Converted model").fill(str(converted_folder))
    page.get_by_role("button", name="Show").click()
    page.wait_for_selector("#layers >> text=hermite_8 >> visible=true")
    assert page.complaints == []

    origin = page.evaluate("location.origin")
    for path in ("/etc/hostname", Path(__file__), converted_folder / "config.json"):
        assert page.request.get(f"{origin}/gradio_api/file={path}").status == 403
    upload = {"files": {"name": "x.txt", "mimeType": "text/plain", "buffer": b"some bytes"}}
    assert page.request.post(f"{origin}/gradio_api/upload", multipart=upload).status == 413


def test_space(served):
    """The file runs alone, as app.py; it sends no analytics, and uses no token of the Space."""
    assert served[1] == "hf_ortho False 1\n"
