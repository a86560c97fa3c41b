"""Figures of training: what is drawn is what was rewarded."""

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from kit.training import plots


def test_a_group_is_drawn_with_its_mean_and_what_becomes_more_likely():
    picture = plots.group([1, 0, 0, 1, 0], [1.1, -0.7, -0.7, 1.1, -0.7])
    left, right = picture.axes
    assert [bar.get_height() for bar in left.patches] == [1, 0, 0, 1, 0]
    assert [bar.get_height() > 0 for bar in right.patches] == [True, False, False, True, False]
    assert left.lines[0].get_ydata()[0] == pytest.approx(0.4)
    assert picture.alt.endswith("mean reward 0.40: 2 are made more likely, 3 less.")
    FigureCanvasAgg(picture).draw()
