"""Figures of parametric memory: what is drawn is what is fetched."""

from matplotlib.backends.backend_agg import FigureCanvasAgg

from kit.parametric import plots


def test_what_a_question_fetches_is_one_block_of_each_level():
    picture = plots.fetched_path([64, 16], 4, [2, 9])
    boxes = picture.axes[0].patches
    filled = [box for box in boxes if box.get_facecolor()[:3] != boxes[0].get_facecolor()[:3]]
    assert len(boxes) == 4 + 16 and len(filled) == 2
    (upper, lower) = sorted(filled, key=lambda box: -box.get_y())
    assert upper.get_x() <= lower.get_x() < upper.get_x() + upper.get_width()  # below its parent
    assert "Of 20 blocks one on each of 2 levels" in picture.alt
    FigureCanvasAgg(picture).draw()
