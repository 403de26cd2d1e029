"""Titles of the items, to show them to people."""

from __future__ import annotations

from hvdrec.config import Config
from hvdrec.storage.parquet import read_table


def item_titles(config: Config) -> list[str]:
    """Return the title of each item of the catalogue, in the order of the catalogue's rows.

    Titles are read from the samples. An item without a title there gets its key instead.
    """
    schema = config.schema
    name, key = schema.own_name("title"), schema.own_name("key")
    catalogue = read_table(config.paths.of("features") / "items.parquet", [key])
    keys = [str(each) for each in catalogue[key].to_pylist()]
    file = config.paths.of("samples") / "items.parquet"
    if not file.is_file():
        return keys
    table = read_table(file)
    if name not in table.column_names:
        return keys
    stored = zip(table[schema.item_key].to_pylist(), table[name].to_pylist(), strict=True)
    by_key = {str(each): title for each, title in stored}
    return [by_key.get(each) or each for each in keys]
