"""The page in headless Chromium, as a laptop and as a phone, and the Space's file."""

import runpy
from pathlib import Path

import pytest

import hf_ortho.app.space

CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture(scope="module")
def page(converted_folder):
    """A laptop's browser window with the page as visitors get it, ``converted_folder`` shown; its complaints."""
    if not CHROMIUM.exists():
        pytest.skip(f"needs {CHROMIUM}")
    sync_api = pytest.importorskip("playwright.sync_api")
    from hf_ortho.app.page import LAUNCH, build

    built = build(str(converted_folder), public=True)
    _, address, _ = built.launch(prevent_thread_lock=True, server_name="127.0.0.1", **LAUNCH)
    try:
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            window = browser.new_page(viewport={"width": 1366, "height": 768})
            window.set_default_timeout(60_000)
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
    finally:
        built.close(verbose=False)


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
    page.wait_for_selector("[role=alert]:has-text('domain from 4 to 3: lo must be below hi')")
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
    page.wait_for_selector("#layers >> text=hermite_8")
    assert overflow(page) == 0
    assert page.locator(".wide .matplotlib img").bounding_box()["x"] >= 0
    page.get_by_label("Converted model").fill(str(converted_folder.parent))
    page.get_by_role("button", name="Show").click()
    page.wait_for_selector("[role=alert]:has-text('is no model on the Hub')")
    assert not page.locator("#layers").is_visible()
    page.get_by_label("Converted model").fill(str(converted_folder))
    page.get_by_role("button", name="Show").click()
    page.wait_for_selector("#layers >> text=hermite_8")
    assert page.complaints == []

    origin = page.evaluate("location.origin")
    for path in ("/etc/hostname", Path(__file__), converted_folder / "config.json"):
        assert page.request.get(f"{origin}/gradio_api/file={path}").status == 403
    upload = {"files": {"name": "x.txt", "mimeType": "text/plain", "buffer": b"some bytes"}}
    assert page.request.post(f"{origin}/gradio_api/upload", multipart=upload).status == 413


def test_space(monkeypatch):
    """The file runs alone, under the name app.py, and does not use the Space's own token."""
    monkeypatch.delenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", raising=False)
    demo = runpy.run_path(hf_ortho.app.space.__file__, run_name="app")["demo"]
    assert hf_ortho.app.space.os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] == "1"
    assert demo.title == "hf_ortho"
    assert demo.analytics_enabled is False
