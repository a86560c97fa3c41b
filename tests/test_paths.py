"""Atomic replacement of files and folders."""

import pytest

from kit.paths import atomic


def test_a_file_or_folder_is_replaced_whole_or_not_at_all(tmp_path):
    for folder in (False, True):
        place = tmp_path / "new" / f"place-{folder}"

        def write(part, text: str, folder=folder) -> None:
            part = part / "inside" if folder else part
            part.parent.mkdir(exist_ok=True)
            part.write_text(text)

        def content(place=place, folder=folder) -> str:
            return (place / "inside" if folder else place).read_text()

        for text in ("old", "new"):
            with atomic(place) as part:
                write(part, text)
                assert part.name == place.name and (text == "old" or content() == "old")
            assert content() == text
        with pytest.raises(OSError, match="full"), atomic(place) as part:
            write(part, "half")
            raise OSError("full")
        assert content() == "new"
    assert len([*(tmp_path / "new").iterdir()]) == 2, "nothing is left beside"
