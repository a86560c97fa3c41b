"""The report page: self-contained, valid, safe against hostile text, repeatable."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest

from kit import paths
from kit.analysis import claims, plots, tables
from kit.analysis.verdicts import RULES, VERDICTS, headline, measured_table
from kit.pipeline import provenance, stages
from kit.report import exhibits, guide
from kit.report import html as report
from kit.schema import Record

EVIL = "<script>alert(1)</script>\"'><img src=//evil.example/x onerror=alert(2)>{{ 7*7 }}"
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Elements with their attributes, the text, and a check that every tag is closed in turn."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open, self.open
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]


def baseline(
    model: str = "bundled:smollm2-135m", arms=("plain", "format"), samples: int = 1
) -> pd.DataFrame:
    """Records of 3 families x 2 levels x 4 problems per arm; one sample needs no bootstrap."""
    rng, rows = np.random.default_rng(0), []
    for arm in arms:
        for family in ("gcd", "spell_backward", "sums"):
            for number in range(8):
                for sample in range(samples):
                    correct = bool(rng.random() < 0.4)
                    rows.append(Record(
                        key=f"{model} {arm} {family}{number} {sample}", generation_key="g",
                        model=model, weights_hash="abcdef012345", arm=arm, policy="full",
                        source="laptop", problem_id=f"{family}{number}", family=family,
                        level=1 + number % 2, sample=sample, seed=0, temperature=0.6,
                        question="q", answer="2", prompt_id="p", text="2", finish="stop",
                        prompt_tokens=9, new_tokens=7, seconds=0.1, kv_reads_tokens=90.0,
                        kv_peak_tokens=15.0, kv_peak_bytes=345600, correct=correct,
                        extracted="2" if correct else "9", reason="equal", method="last number",
                        compliant=arm == "format",
                    ))  # fmt: skip
    return pd.DataFrame(map(vars, rows))


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """Outputs in a folder of the test's own, and a working tree that stands still."""
    here = provenance.collect()
    monkeypatch.setattr(paths, "OUTPUTS", tmp_path)
    monkeypatch.setattr(provenance, "collect", lambda: here)


PUBLISHED = claims.load()
AUDITS = tables.audits(PUBLISHED)
TABLE = measured_table(PUBLISHED, pd.DataFrame(), "laptop")


def write(records: pd.DataFrame, profile="laptop", results=None) -> Path:
    verdicts = measured_table(PUBLISHED, records, profile)
    return report.write(profile, {"01_baseline": records}, verdicts, AUDITS, results or {})


@pytest.fixture(scope="module")
def records() -> pd.DataFrame:
    return baseline()


@pytest.fixture(scope="module")
def page(records, tmp_path_factory) -> Page:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "OUTPUTS", tmp_path_factory.mktemp("outputs"))
        return Page(write(records))


def test_page_loads_nothing_from_anywhere(page):
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "poster", "action", "data", "background"):
            value = attributes.get(name, "#")
            linked = tag == "a" and value in {claim.link for claim in PUBLISHED}
            assert linked or value.startswith(("#", "data:")), (tag, name, value)
        assert not [name for name in attributes if name.startswith("on")]
    assert page.all("script") == [{}] and not page.all("iframe")
    assert not re.search(r"@import|url\(", page.source)
    (policy,) = [m["content"] for m in page.all("meta") if "http-equiv" in m]
    assert policy.startswith("default-src 'none'")


def test_links_resolve_and_ids_are_unique(page):
    assert len(page.ids) == len({*page.ids})
    targets = [unquote(a["href"][1:]) for a in page.all("a") if a["href"][0] == "#"]
    assert len(targets) > 40 and {*targets} <= {*page.ids}
    for _, attributes in page.elements:
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in page.ids
    assert {f"claim-{claim.id}" for claim in PUBLISHED} <= {*page.ids}


def test_a_screen_reader_finds_its_way(page):
    assert page.all("html") == [{"lang": "en-GB"}] and len(page.all("h1")) == 1
    assert len(page.all("img")) == 2
    assert all(len(image["alt"]) > 40 for image in page.all("img"))
    assert len(page.all("caption")) == len(page.all("table")) >= 5
    assert all(cell["scope"] in ("row", "col") for cell in page.all("th"))
    regions = [a for tag, a in page.elements if a.get("class") == "scroll"]
    assert len(regions) == len(page.all("table"))
    assert all(a["tabindex"] == "0" and a["role"] == "region" and a["aria-label"] for a in regions)
    order = [attributes["id"] for attributes in page.all("section")]
    assert order == ["verdicts", "baseline", "samples", "audit", "provenance", "reproduce"]
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:]))


def test_summary_counts_the_verdicts_and_states_the_baseline(page, records):
    text = page.text
    verdicts = measured_table(PUBLISHED, records, "laptop")
    plain = records[records["arm"] == "plain"]
    assert f"checks their {len(verdicts)} published claims" in text
    for line in headline(verdicts.to_dict("records"), AUDITS, "bundled:smollm2-135m"):
        assert line in text
    judged = (verdicts["measured"] != "") & (verdicts["verdict"] != "")
    for on, count in verdicts[~judged]["on"].value_counts().items():
        assert f"{on[0].upper()}{on[1:]}: {count} claims" in text
    share = 100 * plain.groupby("problem_id")["correct"].mean().mean()
    assert f"solves {share:.1f}% of 24 problems (95% interval" in text
    assert "24 samples, plain prompt" in text and "bundled:smollm2-135m" in text


def test_baseline_table_puts_arms_side_by_side(page, records):
    cells = [
        f"{row.accuracy[0]:.1f} [{row.accuracy[1]:.1f}, {row.accuracy[2]:.1f}]"
        for row in tables.arms(records).set_index("arm").loc[["plain", "format"]].itertuples()
    ]
    change = tables.difference(records, "format", "plain", ("accuracy",))["difference"].iloc[0]
    cells.append(f"{change[0]:+.1f} [{change[1]:.1f}, {change[2]:.1f}]")
    assert " ".join(["accuracy, %", *cells]) in page.text


def badges(page: Page) -> list[str]:
    """What the verdicts are marked with, in order."""
    found = [a["class"].removeprefix("badge ") for a in page.all("span") if "class" in a]
    return [slug for slug in found if slug not in ("right", "wrong")]  # of answers


def test_measured_claims_stand_before_the_others(page):
    slugs = badges(page)
    measured = [attributes for tag, attributes in page.elements if "data-word" in attributes]
    assert len(measured) == 1 and slugs[:1] == [each["data-word"] for each in measured]
    order = [*dict.fromkeys(slugs[1:])]
    assert order.index("bears-it") < order.index("needs-the-workstation-profile")
    assert {"quoted", "beyond-this-kit", "not-measured-yet"} < {*order}
    assert len(slugs) == len(PUBLISHED)
    rules = {claim.rule for claim in PUBLISHED}
    assert all(RULES[rule] in page.text for rule in rules)


def test_measured_claims_are_ordered_by_their_word():
    verdicts = measured_table(PUBLISHED, pd.DataFrame(), "laptop")
    words, rows = [*VERDICTS], slice(0, len(VERDICTS) - 1)
    verdicts.loc[rows, "verdict"] = words[::-1]
    verdicts.loc[rows, ["measured", "on"]] = "1 points", "stand-in model"
    page = Page(report.write("laptop", {}, verdicts, AUDITS, {}))
    assert badges(page)[: len(words)] == [word.replace(" ", "-") for word in words]


def test_a_card_says_on_what_a_claim_was_measured_but_arithmetic_was_on_nothing():
    verdicts = measured_table(PUBLISHED, pd.DataFrame(), "laptop")
    verdicts.loc[[0, 1], "verdict"] = "holds here", "agrees"
    verdicts.loc[[0, 1], ["measured", "on"]] = "1 points", "stand-in model"
    verdicts.loc[1, "on"] = "recomputed"
    page = Page(report.write("laptop", {}, verdicts, AUDITS, {}))
    labels = [each.get("data-label") for each in page.all("td")]
    assert labels.count("measured on a ") == labels.count("") == 1


def test_nothing_measured_says_how_to():
    page = Page(write(pd.DataFrame()))
    assert "Nothing has been measured yet." in page.text
    assert "make reproduce PROFILE=laptop ONLY=01" in page.text
    assert "No claim has been measured under the laptop profile." in page.text
    assert len(page.all("img")) == 1  # the audit needs no model
    columns = Page(write(baseline().iloc[:0]))  # a store without rows has columns
    assert columns.text == page.text


def test_one_arm_alone_has_no_difference():
    text = Page(write(baseline(arms=("plain",)))).text
    assert "format − plain" not in text and "plain prompt" in text


def test_two_models_have_a_section_each():
    names = ("hub:Qwen/Qwen3-1.7B", "hub:Qwen/Qwen3-4B-Instruct-2507")
    records = pd.concat(map(baseline, names)).query("family == 'gcd' and level == 1")
    page = Page(write(records, profile="workstation"))
    assert len(page.all("img")) == 3
    assert all(f"{name} without memory solves" in page.text for name in names)


def test_the_headline_names_the_models_of_all_stages():
    stages = {"01_baseline": baseline("bundled:qwen2.5-coder-0.5b"), "03_dms": baseline()}
    verdicts = measured_table(PUBLISHED, stages["01_baseline"], "laptop")
    text = Page(report.write("laptop", stages, verdicts, AUDITS, {})).text
    names = "bundled:qwen2.5-coder-0.5b, bundled:smollm2-135m"
    assert f"On a stand-in model ({names}): " in text, text[:3000]


def test_hostile_text_stays_text():
    hostile = replace(PUBLISHED[3], id=EVIL, statement=EVIL, source=EVIL, system=EVIL, unit=EVIL)
    records = baseline(model=EVIL, arms=("plain", EVIL)).assign(weights_hash=EVIL, source=EVIL)
    records = records.assign(text=EVIL, question=EVIL, retrieved=EVIL, extracted=EVIL)
    verdicts = measured_table([hostile], records, "laptop")
    results = {"01_baseline": {"problems": EVIL}}
    audits = tables.audits([hostile])
    page = Page(report.write("laptop", {"01_baseline": records}, verdicts, audits, results))
    assert page.all("script") == [{}] and "evil.example" in page.text and "{{ 7*7 }}" in page.text
    assert all(image["src"].startswith("data:") for image in page.all("img"))
    assert not [name for _, a in page.elements for name in a if name.startswith("on")]
    assert f"claim-{EVIL}" in page.ids
    links = {a["href"] for a in page.all("a")} - {hostile.link}
    assert {unquote(link[1:]) for link in links} <= {*page.ids}


def test_the_same_input_gives_the_same_bytes():
    records = baseline(samples=3).query("family == 'gcd' and level == 1")
    first = write(records).read_bytes()
    assert write(records.sample(frac=1, random_state=1)).read_bytes() == first
    assert len(first) < 10**6


def test_written_whole_or_not_at_all(monkeypatch):
    path = write(pd.DataFrame())
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write(baseline(arms=("plain",)))
    assert path.read_bytes() == before
    assert [*path.parent.iterdir()] == [path]


def test_no_folder_of_this_machine():
    home, inside = Path.home() / "weights" / "tiny", paths.ROOT / "models" / "small"
    elsewhere = "/mnt/data/llm/Big-1B"
    names = map(str, (home, inside, elsewhere))
    records = pd.concat(
        baseline(name, ("plain",)).query("family == 'gcd' and level == 1") for name in names
    )
    verdicts = measured_table(PUBLISHED, pd.DataFrame(), "laptop")
    verdicts["reason"] = f"see {paths.ROOT}/outputs and {Path.home()}/x"
    path = report.write("laptop", {"01_baseline": records}, verdicts, AUDITS, {})
    page = Page(path)
    for name in ("tiny", "small", "Big-1B"):
        assert f"{name} without memory solves" in page.text
    for folder in (paths.ROOT, Path.home(), "/mnt/data", paths.OUTPUTS):
        assert not re.search(rf"{re.escape(str(folder))}(?![\w-])", page.source), folder


def test_scrubbing_leaves_pictures_alone():
    page = '<img src="data:image/png;base64,secret"> secret'
    cleaned = report._outside_pictures(page, lambda text: text.replace("secret", "***"))
    assert cleaned == '<img src="data:image/png;base64,secret"> ***'


def test_stages_show_what_their_status_files_say():
    done = {"inputs": {}, "wall_seconds": 161.24, "peak_memory_bytes": 3 * 2**29}
    done["finished"] = "2030-01-02"
    first, *others = stages.load_stages("laptop", outputs=paths.OUTPUTS)
    provenance.write_json(first.status_file, done)
    results = {first.name: {"keys": ["a"] * 1234, "problems": "fingerprint-of-problems"}}
    text = Page(write(pd.DataFrame(), results=results)).text
    assert f"{first.name} done 1,234 161.2 s 1.50 GiB 2030-01-02" in text
    assert all(f"{stage.name} not run yet 0 – – –" in text for stage in others)
    assert "fingerprint-of-problems" in text
    provenance.write_text(first.running, "{}")  # its status is that of the run before
    assert f"{first.name} running 1,234 – – –" in Page(write(pd.DataFrame(), results=results)).text


def test_failed_stages_are_told_with_their_first_line():
    every = stages.load_stages("laptop", outputs=paths.OUTPUTS)
    for stage in every:
        provenance.write_json(stage.status_file, {"ok": True})
    why = f"cell 9 raised ValueError: {EVIL}"
    failed = next(stage for stage in every if stage.number == "03")
    provenance.write_json(failed.failed, {"metadata": {"kit": {"failure": why}}})
    exhibits.save(failed.folder / "exhibits" / failed.name, {"Of a run before": AUDITS[:1]}, {})
    every[-1].status_file.unlink()  # it writes the page
    provenance.write_text(every[-1].running, "{}")
    page = Page(write(pd.DataFrame()))
    assert f"Incomplete. 03_dms failed ({why})." in page.text
    assert f"03_dms failed: {why} 0 – – –" in page.text and "07_verdicts running" in page.text
    assert "Its last run failed , so what stands here, if anything, is from an earlier" in page.text
    waiting = {c.id for c in PUBLISHED if c.notebook == "03_dms"}
    waiting &= {*TABLE[TABLE["on"] == "not measured yet"]["claim"]}
    assert page.text.count(f"03_dms failed: {why}") == 1 + len(waiting) > 2
    shutil.rmtree(failed.folder / "exhibits")  # its first run failed
    assert "stage-03_dms" in Page(write(pd.DataFrame())).ids
    failed.failed.unlink()
    assert "Incomplete" not in Page(write(pd.DataFrame())).text
    every[1].status_file.unlink()
    assert "Incomplete. 01_baseline not run yet." in Page(write(pd.DataFrame())).text


def test_colours_of_words_reach_contrast_in_both_modes():
    style = (paths.ROOT / "kit" / "report" / report.TEMPLATE).read_text(encoding="utf-8")
    light, dark = style.split("prefers-color-scheme: dark", 1)

    def luminance(colour: str) -> float:
        digits = colour * 2 if len(colour) == 3 else colour
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    for mode in (light, dark):
        colours = {name: luminance(c) for name, c in re.findall(r"--([\w-]+): #(\w+)", mode)}
        pairs = [(name, f"on-{name}") for name in colours if f"on-{name}" in colours]
        pairs += [("ink", "paper"), ("soft", "paper"), ("link", "paper"), ("grey", "paper")]
        assert len(pairs) == 9
        for pair in pairs:
            low, high = sorted(colours[name] for name in pair)
            assert (high + 0.05) / (low + 0.05) >= 4.5, pair  # WCAG 2.2, 1.4.3


def test_each_notebook_shows_its_tables_and_figures():
    frame = pd.DataFrame({"arm": [EVIL, "plain"], "accuracy": [(50.0, 40.0, 60.0), None]})
    table = pd.DataFrame({"arm": ["a"], "control": ["b"], "difference": [(1.0, -1.0, 3.0)]})
    drawn = {"Against its control": plots.forest(table.assign(primary=True))}
    for stage in ("01_baseline", "05_parametric"):
        place = paths.run_dir("laptop") / "exhibits" / stage
        exhibits.save(place, {"Who knows what": frame, "More of it": frame}, drawn)
    page = Page(write(pd.DataFrame()))
    assert page.ids.count("stage-05_parametric") == 1 and "stage-01_baseline" not in page.ids
    assert "fetch the weights that the context needs" in page.text
    assert "make reproduce PROFILE=laptop ONLY=05" in page.text and "50.0 [40.0" in page.text
    (image,) = [image for image in page.all("img") if "declared contrast, b" in image["alt"]]
    assert image["src"].startswith("data:image/svg+xml") and page.all("script") == [{}]
    links = {a["href"] for a in page.all("a")}
    links -= {claim.link for claim in PUBLISHED}
    assert "#stage-05_parametric" in links and {link[1:] for link in links} <= {*page.ids}


def test_what_was_asked_and_found_stands_first_for_who_read_no_paper():
    row = {"arm": "retrieved", "control": "format-only", "problems": 147, "equal finish": None}
    results = {"02_strategies": {"contrasts": [row | {"difference": [3.4, -3.2, 10.2]}]}}
    text = Page(write(baseline(), results=results)).text
    asked, verdicts = text.index("What was asked, what came out"), text.index("Each claim got its")
    found = "with a prompt that asks for the form alone (format-only): +3.4 [-3.2, 10.2]"
    assert asked < text.index(found) < verdicts
    assert "Zero lies in the interval: no difference is shown, on 147 problems" in text
    results["02_strategies"]["contrasts"][0]["difference"] = [3.4, 1.2, 10.2]
    assert "The interval excludes zero" in Page(write(baseline(), results=results)).text
    declared = [(own["arm"], own["control"]) for own in claims.primary().values()]
    assert {arm for arms in declared for arm in arms} == {*guide.ARMS}


def test_every_figure_that_a_run_saves_is_explained_and_numbered(page):
    published = (paths.ROOT / "outputs" / "published" / "laptop" / "exhibits").iterdir()
    figures = [each for folder in published for each in exhibits.load(folder)
               if isinstance(each, exhibits.Figure)]  # fmt: skip
    assert len(figures) > 8 and {each.caption for each in figures} <= {*guide.READING}
    assert "Figure 1. Accuracy without memory" in page.text
    assert "Figure 2. Published differences" in page.text


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
PROBE = """<script>
const [system] = document.querySelectorAll("#verdicts select");
const choose = (select, at) => {
  select.selectedIndex = at;
  select.dispatchEvent(new Event("input", {bubbles: true}));
};
choose(system, 1);
const heads = [...document.querySelectorAll("#audit thead th")];
const head = heads.find(th => th.textContent.startsWith("n needed"));
const rows = head.closest("table").tBodies[0];
head.querySelector("button").click();
document.title = JSON.stringify({
  sort: head.getAttribute("aria-sort"),
  order: [...rows.rows].map(row => row.cells[head.cellIndex].textContent),
  shown: [...document.querySelectorAll("tr[data-system]")].map(
    row => [row.dataset.system == system.value, getComputedStyle(row).display != "none"]),
  said: document.querySelector("#verdicts output").value,
  wide: document.documentElement.scrollWidth > innerWidth,
});
</script></body>"""


def browsed(file: Path, tmp_path: Path, width: int = 1280) -> tuple[str, str]:
    """What a headless browser makes of a page, and what it logs."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += ["--disable-background-networking", f"--user-data-dir={tmp_path / 'browser'}"]
    command += [f"--window-size={width},900"]
    done = subprocess.run(
        [*command, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120
    )
    return done.stdout, done.stderr


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium here")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_nothing_fails_and_tables_are_sorted(width, tmp_path):
    path = write(baseline())
    shown, log = browsed(path, tmp_path, width)
    assert "What does memory buy" in shown
    assert "CONSOLE" not in log, log[-2000:]  # where a load that the policy refuses is told too
    probed = path.with_name("probed.html")  # the page, clicked by a script that its policy refuses
    source = re.sub(r"<meta http-equiv.*?>", "", path.read_text()).replace("</body>", PROBE)
    probed.write_text(source)
    shown, log = browsed(probed, tmp_path, width)
    found = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", shown)[1]))
    numbers = [int(text.replace(",", "")) for text in found["order"] if text != "–"]
    assert found["sort"] == "ascending" and numbers == sorted(numbers) and len(numbers) > 9
    assert not found["wide"] and "CONSOLE" not in log
    assert all(is_word == visible for is_word, visible in found["shown"])
    count = sum(is_word for is_word, _ in found["shown"])
    assert found["said"] == f"{count} of {len(PUBLISHED)} shown" and 0 < count < len(PUBLISHED)
