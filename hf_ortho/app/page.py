"""The Gradio page, with a tab for fits and a tab for checkpoints."""

from __future__ import annotations

import html
from typing import Any

import gradio as gr

from ..activations import FAMILIES
from ..activations.base import MAX_DEGREE
from ..errors import HfOrthoError
from ..fitting.density import DATA_FREE
from ..plotting import draw_fit
from ..text import markdown, markdown_table
from .checkpoint import COLUMNS, Shapes, shapes
from .fit import Fit, fit, sources

SEARCHED, GIVEN = "searched", "two numbers"
LAUNCH: dict[str, Any] = {
    "theme": gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    "css": """
.gradio-container { max-width: 1280px !important; width: 100% !important; margin: 0 auto !important; }
.refusal p { color: var(--error-text-color); font-weight: 600; margin: 0.5em 0; }
.figures td, .figures th { padding: 0.3em 0.6em !important; font-variant-numeric: tabular-nums; }
.figures td + td, .figures th + th { text-align: right !important; white-space: nowrap; }
.matplotlib img { width: 100%; max-height: none !important; }
.wide { overflow-x: auto !important; contain: inline-size; }
@media (max-width: 700px) { .wide .matplotlib { width: 760px; } }
""",
    "allowed_paths": [],
    "max_file_size": "1b",  # nothing is uploaded
    "footer_links": [],
    "run_history": False,
    "enable_monitoring": False,
    "ssr_mode": False,
    "mcp_server": False,
    "pwa": False,
    "quiet": True,
}


CODE: dict[str, Any] = {"wrap_lines": True, "show_line_numbers": False, "max_lines": 12}


def build(model: str = "", revision: str = "", *, public: bool = True) -> gr.Blocks:
    """Build the page. Launch it with the options ``LAUNCH``.

    Args:
        model: folder or Hub model to show on startup.
        public: visitors can only open Hub models, and no local folder except ``model``.

    Raises:
        CheckpointError, ConfigError: ``model`` cannot be shown.
    """
    shown = _show_shapes(shapes(model, revision)) if model else _no_shapes()
    first = _show_fit(fit("gelu", "hermite", 8))

    def refit(source, family, degree, tails, kind, lo, hi):
        try:
            return _show_fit(fit(source, family, degree, tails, (lo, hi) if kind == GIVEN else None))
        except HfOrthoError as error:
            return [_sentence(error), gr.update(visible=False), *[gr.skip()] * 6]

    def read(name, revision):
        try:
            return _show_shapes(shapes(name, revision, public=public and name.strip() != model))
        except HfOrthoError as error:
            return _no_shapes(error)

    with gr.Blocks(title="hf_ortho", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(
            "# hf_ortho\nLearnable activations for transformers, fitted to the activations of pretrained models."
        )
        with gr.Tab("Fit"), gr.Row():
            with gr.Column(scale=1, min_width=260):
                source = gr.Dropdown(
                    sources(), value="gelu", label="Source activation", allow_custom_value=True, elem_id="source"
                )
                family = gr.Radio(list(FAMILIES), value="hermite", label="Family", elem_id="family")
                degree = gr.Number(8, label=f"Degree, 1 to {MAX_DEGREE}", step=1, elem_id="degree")
                tails = gr.Checkbox(True, label="Straight tails outside the domain", elem_id="tails")
                kind = gr.Radio([SEARCHED, GIVEN], value=SEARCHED, label="Domain", elem_id="kind")
                with gr.Row(visible=False) as ends:
                    lo = gr.Number(-3, label="lo", min_width=80, elem_id="lo")
                    hi = gr.Number(3, label="hi", min_width=80, elem_id="hi")
            with gr.Column(scale=3, min_width=320):
                refusal = gr.HTML(visible=False, elem_classes="refusal", elem_id="fit-refusal")
                with gr.Column() as result:
                    with gr.Row():
                        value = gr.Plot(first[2], label="f", show_label=False, format="png", min_width=320)
                        slope = gr.Plot(first[3], label="f'", show_label=False, format="png", min_width=320)
                    figures = gr.Markdown(first[4], elem_classes="figures", elem_id="figures")
                    parameters = gr.Code(first[5], "json", label="Parameters", **CODE)
                    command = gr.Code(first[6], "shell", label="Convert a checkpoint", **CODE)
                    python = gr.Code(first[7], "python", label="In Python", **CODE)
        with gr.Tab("Checkpoint"):
            with gr.Row(equal_height=True):
                place = "OWNER/NAME on the Hub" if public else "OWNER/NAME on the Hub, or a folder"
                name = gr.Textbox(
                    model,
                    label="Converted model or adapter",
                    placeholder=place,
                    scale=3,
                    min_width=260,
                    max_lines=1,
                    elem_id="model",
                )
                commit = gr.Textbox(
                    revision, label="Revision", placeholder="main", scale=1, max_lines=1, elem_id="revision"
                )
                go = gr.Button("Show", variant="primary", scale=0, min_width=120)
            refused = gr.HTML(visible=False, elem_classes="refusal", elem_id="model-refusal")
            with gr.Column(visible=bool(model)) as layers:
                title = gr.Markdown(shown[2])
                picture = gr.Plot(shown[3], label="shapes", show_label=False, format="png", elem_classes="wide")
                table = gr.Dataframe(shown[4], headers=COLUMNS, interactive=False, max_height=420, elem_id="layers")
                gr.Markdown(
                    "E under N(0, 1). Distance from the source: sup on the real line (without tails on the domain), "
                    f"rms under {DATA_FREE}."
                )
                commands = gr.Code(shown[5], "shell", label="Run on your machine", **CODE)
        kind.change(lambda kind: gr.update(visible=kind == GIVEN), kind, ends, api_visibility="private")
        inputs = [source, family, degree, tails, kind, lo, hi]
        outputs = [refusal, result, value, slope, figures, parameters, command, python]
        changes = [source.change, family.change, degree.change, tails.change, kind.change, lo.change, hi.change]
        gr.on(changes, refit, inputs, outputs, trigger_mode="always_last", api_name="fit")
        gr.on(
            [go.click, name.submit, commit.submit],
            read,
            [name, commit],
            [refused, layers, title, picture, table, commands],
            api_name="shapes",
        )
    return page.queue(max_size=32)


def _sentence(text: object = "") -> dict:
    """The error message on the page; hidden if empty."""
    return gr.update(value=f'<p role="alert">{html.escape(str(text))}</p>', visible=bool(text))


def _show_fit(fitted: Fit) -> list:
    ends = None if fitted.tails else fitted.domain
    note = f"\n\n{markdown(fitted.report.note)}" if fitted.report.note else ""
    return [
        _sentence(),
        gr.update(visible=True),
        *draw_fit(fitted.module, fitted.source, ends),
        markdown_table(["", "f", "f'"], fitted.figures()) + note,
        fitted.parameters(),
        fitted.command(),
        fitted.python(),
    ]


def _show_shapes(summary: Shapes) -> list:
    text = "\n\n".join(map(markdown, (summary.title, *summary.notes)))
    return [_sentence(), gr.update(visible=True), text, summary.figure, summary.rows, summary.commands]


def _no_shapes(text: object = "") -> list:
    return [_sentence(text), gr.update(visible=False), "", None, [], ""]
