"""Figures: what is drawn is what the table says, nothing overlaps, the bytes repeat."""

import base64
import re
from functools import cache

import numpy as np
import pandas as pd
import pytest
from IPython.core.formatters import DisplayFormatter
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.lines import Line2D

from kit.analysis import claims, plots, tables
from kit.budget.plots import ledger_bars
from kit.dms import plots as dms_plots
from kit.parametric import plots as parametric_plots
from kit.training import checkpoint_selection
from kit.training import plots as curves


def family_table(rows: list[tuple]) -> pd.DataFrame:
    """What `tables.by_family` gives, as far as the figure reads it."""
    table = pd.DataFrame(rows, columns=["family", "level", "accuracy"])
    return table.astype({"level": object})


def many(shift: float) -> pd.DataFrame:
    rows = [(f"family_relationships_{i}", level, (20 + shift, 10 + shift, 40 + shift))
            for i in range(12) for level in (1, 2, 3)]  # fmt: skip
    return family_table([*rows, ("all", "", (20 + shift, 18 + shift, 22 + shift))])


def small() -> dict[str, pd.DataFrame]:
    plain = [("gcd", 1, (50.0, 20.0, 80.0)), ("sums", 2, (0.0, 1e-15, 30.0))]
    form = [("gcd", 1, (60.0, 30.0, 90.0)), ("sums", 2, (100.0, 70.0, 100.0 - 1e-13))]
    return {
        "plain": family_table([*plain, ("all", "", (25.0, 20.0, 30.0))]),
        "format": family_table([*form, ("all", "", (80.0, 75.0, 85.0))]),
    }


def drawn(picture: plots.Picture) -> dict[str, list[tuple]]:
    """By legend label the (x, low, high, name of the row) of every point."""
    (axes,) = picture.axes
    ticks, texts = axes.get_yticks(), [label.get_text() for label in axes.get_yticklabels()]
    found = {}
    for container in axes.containers:
        line, _, (bars,) = container
        points = []
        for x, y, segment in zip(line.get_xdata(), line.get_ydata(), bars.get_segments()):
            name = texts[int(np.argmin(np.abs(ticks - y)))]
            points.append((x, segment[0][0], segment[1][0], name))
        found[container.get_label()] = points
    return found


def boxes(picture: plots.Picture):
    """Drawn extents of axes, legend, row names and the whole, in pixels."""
    renderer = FigureCanvasAgg(picture).get_renderer()
    picture.draw(renderer)
    (axes,), (legend,) = picture.axes, picture.legends
    names = [label.get_window_extent(renderer) for label in axes.get_yticklabels()]
    around = [axes.xaxis.label.get_window_extent(renderer), *names]
    return axes.get_window_extent(), legend.get_window_extent(renderer), names, around, picture.bbox


def contrasts_of(count: int) -> pd.DataFrame:
    """A table of `count` contrasts as `tables.against` makes it."""
    rows = [("retrieved", f"retrieved-arm{i}", (i - 4.0, i - 6.0, i + 1.0)) for i in range(count)]
    table = pd.DataFrame(rows, columns=["arm", "control", "difference"])
    return table.assign(primary=[True] + [False] * (count - 1))


@cache
def audits_of_all() -> pd.DataFrame:
    return tables.audits(claims.load())


def test_accuracy_draws_the_table():
    points = drawn(plots.accuracy_by_family(small()))
    assert [*points] == ["plain", "format"]
    for arm, table in small().items():
        assert [name for *_, name in points[arm]] == ["gcd 1", "sums 2", "all"]
        for (*numbers, _), expected in zip(points[arm], table["accuracy"], strict=True):
            assert numbers == pytest.approx(expected)


def test_arms_with_different_families_share_their_rows():
    plain = small()["plain"]
    form = family_table([("words", 1, (5.0, 0.0, 9.0)), ("all", "", (5.0, 0.0, 9.0))])
    points = drawn(plots.accuracy_by_family({"plain": plain, "format": form}))
    assert [name for *_, name in points["plain"]] == ["gcd 1", "sums 2", "all"]
    assert [name for *_, name in points["format"]] == ["words 1", "all"]


def test_effects_are_the_differences_with_counts_split_as_their_readings_are():
    audits = audits_of_all()
    points = drawn(plots.published_effects(audits))
    rows = audits[audits["p"].notna()]
    assert sum(map(len, points.values())) == len(rows) > 20
    (clear, ends), (unclear, _) = points.items()
    assert clear == f"told from zero ({len(ends)})" and unclear.startswith("not told from zero")
    assert all(low > 0 or high < 0 for _, low, high, _ in ends)
    by_claim = rows.set_index("claim")
    assert all("cannot tell" in by_claim.loc[name, "reading"] for *_, name in points[unclear])
    assert not any("cannot tell" in by_claim.loc[name, "reading"] for *_, name in ends)
    for x, low, high, name in ends + points[unclear]:
        expected = by_claim.loc[name, ["estimate", "low", "high"]].to_list()
        assert [x, low, high] == pytest.approx(expected)


def test_effects_leave_out_other_units():
    audits = audits_of_all().query("claim == 'rbslm-memory-gain'")
    other = audits.assign(claim="steps", published="8 against 9 steps")
    points = drawn(plots.published_effects(pd.concat([audits, other])))
    assert [name for found in points.values() for *_, name in found] == ["rbslm-memory-gain"]


@pytest.mark.parametrize(
    "picture",
    [
        lambda: plots.accuracy_by_family(small()),
        lambda: plots.accuracy_by_family({"plain": many(0)}),
        lambda: plots.accuracy_by_family({str(i): many(10 * i) for i in range(4)}),
        lambda: plots.published_effects(audits_of_all()),
        lambda: plots.published_effects(audits_of_all().query("claim == 'rbslm-memory-gain'")),
        lambda: plots.forest(contrasts_of(9)),
        lambda: plots.forest(contrasts_of(1)),
    ],
    ids=["small", "one arm", "four arms", "all claims", "one claim", "nine arms", "one control"],
)
def test_nothing_overlaps_or_is_cut_off(picture):
    axes, legend, names, around, whole = boxes(picture())
    assert not legend.overlaps(axes)
    for above, below in zip(names, names[1:]):
        assert not above.overlaps(below)
    for box in [*around, legend]:
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1
        assert whole.y0 <= box.y0 and box.y1 <= whole.y1
    assert axes.width > 0.3 * whole.width  # long names leave room for the data


def test_alt_text_says_the_overall_numbers():
    assert plots.accuracy_by_family(small()).alt == (
        "Accuracy by problem family and level. Over all problems: "
        "plain 25% (20% to 30%); format 80% (75% to 85%)."
    )
    of = ["rbslm-memory-gain", "rbslm-memory-compliance", "rbslm-scaling-40"]
    audits = audits_of_all().query(f"claim in {of}")
    alt = plots.published_effects(audits).alt
    assert alt.startswith("Of 3 published differences")
    assert alt.endswith("1 can be told from zero by their own numbers and 2 cannot."), "p = 0.12"


def test_svg_repeats_is_self_contained_and_escapes():
    first, second = (plots.accuracy_by_family(small()) for _ in range(2))
    assert plots.svg(first) == plots.svg(second)
    first.alt = '"><script>alert(1)</script>'
    tag = plots.svg(first)
    assert "<script>" not in tag and tag.count("<") == 1
    source = base64.b64decode(re.search(r'base64,([^"]+)"', tag)[1]).decode()
    assert source.count("<svg") == 1 and "<text" not in source  # letters are shapes
    links = re.findall(r'(?:xlink:href|href|src)="([^"]*)"', source)
    assert links and all(link.startswith("#") for link in links)


def test_notebooks_show_a_picture_with_its_text():
    data, _ = DisplayFormatter().format(plots.accuracy_by_family(small()))
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert data["text/plain"].startswith("Accuracy by problem family")


def test_series_differ_in_colour_and_in_marker():
    colours, markers = zip(*plots.SERIES)
    assert len({*colours}) == len({*markers}) == len(plots.SERIES)


def looks(picture: plots.Picture) -> dict[str, tuple]:
    """Colour and fill of each name in a figure."""
    found = {}
    for axes in picture.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            shape = handle if isinstance(handle, Line2D) else handle[0]  # of error bars, of bars
            if isinstance(shape, Line2D):
                look = shape.get_color(), shape.get_markerfacecolor(), shape.get_fillstyle()
            else:
                look = shape.get_facecolor(), shape.get_hatch()
            found[name] = look
    return found


def test_a_name_has_one_colour_in_all_figures():
    policies = pd.DataFrame({
        "policy": ["full", "dms", "window", "tova", "h2o", "random", "knorm", "rkv", "snapkv"],
        "compression_x": 4.0, "kept_fraction": 0.25, "kl": [(1.0, 0.9, 1.1)] * 9, "kv_bytes": 1e6,
    })  # fmt: skip
    arms = ["plain", "fetched", "wrong", "shared", "shared-bank", "rag", "rag 5", "lora-ffn"]
    facts = pd.DataFrame({
        "arm": arms, "accuracy": [(50.0, 40.0, 60.0)] * len(arms), "read_bytes": 1.0,
    })  # fmt: skip
    facts = facts.assign(all=facts["accuracy"])
    ways = pd.DataFrame({"way": ["with the bank", "without the bank"], "round": 0})
    ways["accuracy"] = [(50.0, 40.0, 60.0)] * 2
    groups = [
        [dms_plots.quality(policies), dms_plots.quality(policies[1:]),
         dms_plots.quality(policies[::-2]), dms_plots.allocated(policies)],
        [parametric_plots.accuracy_by_frequency(facts, ["all"]),
         parametric_plots.accuracy_by_frequency(facts[::-2], ["all"]),
         parametric_plots.accuracy_by_bytes(facts[2:])],
        [curves.rounds(ways), curves.rounds(ways[::-1])],
        [ledger_bars({"a": {"bank": 1, "norms": 2, "keys and values": 3}}),
         ledger_bars({"a": {"keys and values": 3, "strategies": 1}})],
    ]  # fmt: skip
    for pictures in groups:
        named = looks(pictures[0])
        assert len({*named.values()}) == len(named), "two names look alike"
        for picture in pictures[1:]:
            drawn_now = looks(picture)
            assert drawn_now.keys() & named.keys()
            for name in drawn_now.keys() & named.keys():
                assert drawn_now[name] == named[name], name


def test_a_name_that_is_not_listed_takes_a_free_place():
    assert plots.places(["new", "fetched", "plain", "newer"]) == [2, 1, 0, 3]
    assert [plots.look(place)["linestyle"] for place in (6, 7, 14)] == ["-", "--", ":"]


def test_forest_draws_the_contrasts_and_tells_the_declared_one():
    table = contrasts_of(4)
    points = drawn(plots.forest(table))
    assert [len(points["declared"]), len(points["further"])] == [1, 3]
    for (x, low, high, name), row in zip(
        points["declared"] + points["further"], table.itertuples(), strict=True
    ):
        assert (x, low, high) == pytest.approx(row.difference)
        assert name == row.control
    assert "the declared contrast, retrieved-arm0, is -4.0 points [-6.0, 1.0]" in (
        plots.forest(table).alt
    )


def test_the_map_shows_every_strategy_where_its_vector_is():
    rng = np.random.default_rng(0)
    families = [f"family_{i % 7}" for i in range(70)]
    kinds = ["success" if i % 3 else "failure" for i in range(70)]
    vectors = np.zeros((70, 20))
    vectors[:, 5], vectors[:, 9] = 3 * rng.normal(size=70), rng.normal(size=70)
    picture = plots.bank_map(vectors, families, kinds)
    (axes,) = picture.axes
    groups = {c.get_label(): c.get_offsets() for c in axes.collections}
    assert len(groups) == 14 and sum(map(len, groups.values())) == 70
    first = np.concatenate([groups[name][:, 0] for name in groups])
    true = np.sort(np.abs(vectors[:, 5] - vectors[:, 5].mean()))
    assert np.allclose(np.sort(np.abs(first)), true, atol=0.5), "the widest axis is the first"
    colours = {tuple(c.get_facecolor()[0]) for c in axes.collections}
    assert len(colours) == 7, "seven families, seven colours"
    assert picture.alt.startswith("70 strategies of 7 families") and "100%" in picture.alt


def test_the_cosine_figure_draws_the_curves_and_counts_the_long_outputs():
    table = pd.DataFrame(
        {"ratio": [0.0, 1, 2], "right, published": [1, 0.5, 1], "x": [1, 0.5, 0.5]}
    )
    lengths = {"characters": np.array([0.5, 1.5, 2.5, 9.0]), "tokens": np.array([0.5, 1.0, 1.0])}
    picture = curves.cosine(lengths, table)
    upper, lower = picture.axes
    assert [line.get_label() for line in upper.get_lines()] == ["right, published", "x"]
    assert list(upper.get_lines()[1].get_ydata()) == [1, 0.5, 0.5]
    shares = [patch.get_data().values.sum() for patch in lower.patches]
    assert shares == pytest.approx([100, 100]), "what is longer than the axis is in its last bar"
    assert "characters 75%, tokens 0%" in picture.alt


def test_checkpoints_and_rounds_are_drawn_where_the_table_says():
    logs = checkpoint_selection.open_rs_logs()
    picture = curves.checkpoints(logs)
    assert len(picture.axes) == 3 and len(picture.axes[0].containers) == 3
    drawn_ = picture.axes[0].containers[2].lines[0].get_ydata()
    wanted = logs.query("experiment == 3 and benchmark == 'aime24'")["accuracy"]
    assert list(drawn_) == [accuracy[0] for accuracy in wanted]
    rows = [{"round": r, "way": way, "accuracy": (10.0 * r, 5.0, 40.0)} for r in (0, 1)
            for way in ("with", "without")]  # fmt: skip
    picture = curves.rounds(pd.DataFrame(rows))
    assert picture.alt == "Accuracy by round of training: with 0%, 10%; without 0%, 10%."
    assert [c.get_label() for c in picture.axes[0].containers] == ["with", "without"]


def test_training_curves_have_a_band_over_seeds_and_only_panels_with_numbers():
    runs = [[{"step": s, "reward": s * seed, "kl": 0.1} for s in (1, 2, 3)] for seed in (1, 3)]
    picture = curves.training(runs, {"reward": "reward", "none": "none", "kl": "KL"})
    first, second = [axes for axes in picture.axes if axes.get_visible()]
    assert list(first.get_lines()[0].get_ydata()) == [2, 4, 6] and first.get_title() == "reward"
    ends = first.collections[0].get_paths()[0].get_extents()
    assert (ends.ymin, ends.ymax) == (1, 9) and second.get_title() == "KL"


def test_the_growing_cache_peaks_at_all_tokens_and_reads_each_at_every_step():
    picture = plots.cache_growth(10, 4)
    assert "grows to 13 entries, and 46 are read" in picture.alt  # 10 + 11 + 12 + 13
    assert list(picture.axes[0].lines[0].get_ydata()) == [10, 11, 12, 13]
    FigureCanvasAgg(picture).draw()


def test_the_steps_of_a_method_stand_in_boxes_joined_by_arrows():
    picture = plots.flow(["solve", "judge\nit", "keep"], back="next problem")
    assert picture.alt == "solve, then judge it, then keep; back to the first: next problem."
    texts = [text.get_text() for text in picture.axes[0].texts]
    assert [text for text in texts if text] == ["solve", "judge\nit", "keep", "next problem"]
    assert sum(not text for text in texts) == 3  # arrows, with the one back
    FigureCanvasAgg(picture).draw()
