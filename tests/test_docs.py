"""README.md and docs/: snippets run, links lead somewhere, commands exist."""

import json
import re
import shlex
from pathlib import Path

import pytest
import typer

from kit import cli
from tests.fake_openai import served

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TAUGHT = "Go through the word once again."
LESSON = [{"title": "T", "description": "D.", "content": TAUGHT}]
SAID = f"[[ ## lessons ## ]]\n{json.dumps(LESSON)}\n\n[[ ## completed ## ]]"  # by DSPy's adapter
BUNDLED = "bundled:smollm2-135m"
SHORTER = {"max_new_tokens=64": "max_new_tokens=8"}  # what a test changes, by page; TINY: the model
TINY = {BUNDLED: "{tiny}"}
ASKED = TINY | {'-mini")': '-mini", cache=False)'}
CHANGED = {"dms.md": SHORTER, "training.md": TINY, "budget.md": TINY, "extending.md": TINY}
CHANGED |= {"reasoning_bank.md": ASKED}
OTHERS = {"problems.md", "extending.md"}  # pages with snippets that are no system's


def snippets(page: Path) -> list[str]:
    return [code for language, code in CODE.findall(page.read_text()) if language == "python"]


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub links to them."""
    heads = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=lambda p: p.name)
def test_the_snippets_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch, tiny_folder):
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    names, changed = {}, CHANGED.get(page.name, {})
    assert all(old in "".join(snippets(page)) for old in changed)
    with served(lambda messages: SAID) as (address, asked):
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        monkeypatch.setenv("OPENAI_API_BASE", address)
        for code in snippets(page):
            for old, new in changed.items():
                code = code.replace(old, new.format(tiny=tiny_folder))
            exec(compile(code, page.name, "exec"), names)
    assert bool(asked) == any("openai/" in code for code in snippets(page))
    if asked:
        assert [*names["taught"].table()["content"]] == [TAUGHT] * 2


def test_every_system_has_a_page_with_an_example_that_runs():
    systems = {"reasoning_bank.md", "dms.md", "training.md", "parametric.md", "budget.md"}
    assert systems | OTHERS == {page.name for page in PAGES if snippets(page)}
    for page in (ROOT / "docs" / name for name in systems):
        assert "limits" in anchors(page), page.name


def test_the_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= 10_000


def test_every_relative_link_leads_to_a_file_or_a_heading(subtests):
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", page.read_text())):
            if not link.startswith("https://"):
                with subtests.test(page=page.name, link=link):
                    path, _, anchor = link.partition("#")
                    target = (page.parent / path).resolve() if path else page
                    assert target.exists()
                    assert not anchor or anchor in anchors(target)


def test_every_page_of_docs_is_reached_from_the_readme():
    reached, queue = set(), [ROOT / "README.md"]
    while queue:
        page = queue.pop()
        if page in reached:
            continue
        reached.add(page)
        links = re.findall(r"\]\(([^)#\s]+\.md)", page.read_text())
        queue += [(page.parent / link).resolve() for link in links if "://" not in link]
    assert set(PAGES) <= reached


def test_every_command_that_a_page_names_exists(subtests):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = typer.main.get_command(cli.app).commands
    for page in PAGES:
        text = page.read_text()
        with subtests.test(page.name):
            for target in re.findall(r"(?:`|^|\n|then `)make ([a-z-]+)", text):
                assert target in targets, f"make {target}"
            for command in re.findall(r"(?:-m kit|`kit) ([a-z-]+)", text):
                assert command in commands, f"kit {command}"
            assert not re.findall(r"-m kit\.\w+", text), "python -m kit is the only command line"


def test_every_command_line_of_a_page_is_one_that_the_kit_takes(subtests):
    commands, count = typer.main.get_command(cli.app).commands, 0
    for page in (page for page in PAGES if page.name != "cli.md"):  # test_cli checks that one
        text = page.read_text()
        blocks = "".join(code for language, code in CODE.findall(text) if not language)
        lines = re.findall(r"-m kit (.+)", blocks.replace("\\\n", ""))
        for line in lines + re.findall(r"`python -m kit ([^`]+)`", CODE.sub("", text)):
            name, *arguments = shlex.split(line, comments=True)
            with subtests.test(page=page.name, line=line):
                assert commands[name].make_context(name, arguments)
            count += 1
    assert count > 10
