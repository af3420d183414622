"""The plot of the loss, and the process that draws it."""

import pytest

from headrace.train.plot import draw

LINES = [{"step": i, "loss": 9.0 - i} | ({"val_loss": 9.5 - i} if i % 2 else {}) for i in range(1, 7)]


@pytest.mark.parametrize("lines", [LINES, LINES[:1], [{"step": 1, "loss": float("nan")}]], ids=["all", "one", "nan"])
def test_the_plot_is_a_picture(lines, tmp_path):
    assert draw(lines, tmp_path / "loss.png") is None
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_held_out_losses_are_drawn_where_there_are_any(tmp_path):
    draw(LINES, tmp_path / "with.png")
    draw([{"step": line["step"], "loss": line["loss"]} for line in LINES], tmp_path / "without.png")
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()


def test_a_plot_that_cannot_be_written_is_a_message(tmp_path):
    assert "No such file" in str(draw(LINES, tmp_path / "missing" / "loss.png"))


def test_a_library_that_ends_its_process_does_not_end_the_run(tmp_path, monkeypatch):
    """As OpenBLAS does when it finds no memory for its buffer."""
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib" / "__init__.py").write_text("import os\nos._exit(1)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "loss.png could not be drawn: exit status 1" in str(draw(LINES, tmp_path / "loss.png"))
