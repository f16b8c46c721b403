import pytest
from matplotlib.figure import Figure


@pytest.fixture
def figure_of(monkeypatch, tmp_path):
    """``figure_of(plot_activations, panels)``: the figure that the function would save."""

    def figure_of(draw, *args, **kwargs):
        figures = []

        def savefig(figure, path, *rest, **options):
            figures.append(figure)
            path.write_bytes(b"")

        with monkeypatch.context() as patch:
            patch.setattr(Figure, "savefig", savefig)
            draw(*args, tmp_path / "drawn.png", **kwargs)
        return figures[0]

    return figure_of
