"""What `--engine spark` says where Spark cannot start."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hvdrec.errors import UserError
from hvdrec.parallel.spark import spark_session


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyspark.sql", None)
    with (
        pytest.raises(UserError, match=r"pip install 'hvdrec\[spark\]'") as caught,
        spark_session("a"),
    ):
        pass
    assert (caught.value.field, caught.value.value) == ("engine", "spark")


def test_a_missing_java_is_named_with_its_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="openjdk-17-jre-headless") as caught, spark_session("a"):
        pass
    assert (caught.value.field, caught.value.value) == ("engine", "spark")
