"""The names of `hvdrec`: imported when they are used, and cheap until then."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import hvdrec
from hvdrec.config import Config, Feature, load_config
from tests.small_data import TOML, small_config


def _run(program: str) -> str:
    """Run Python code in a process of its own and return its standard output."""
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout


def test_import_loads_no_other_package() -> None:
    program = (
        "import json, sys; before = set(sys.modules); import hvdrec; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    loaded = {name.partition(".")[0] for name in json.loads(_run(program))}
    assert loaded - set(sys.stdlib_module_names) == {"hvdrec"}


def test_scorer_needs_only_numpy_and_onnxruntime() -> None:
    program = (
        "import json, sys, hvdrec; hvdrec.Scorer; "
        "print(json.dumps([name for name in sys.modules if '.' not in name]))"
    )
    loaded = set(json.loads(_run(program)))
    assert {"numpy", "onnxruntime"} <= loaded
    assert not loaded & {"torch", "pyarrow", "pandas", "pydantic", "onnx", "horovod", "optuna"}


def test_every_public_name_can_be_imported() -> None:
    for name in hvdrec.__all__:
        assert name in dir(hvdrec)
        assert getattr(hvdrec, name) is not None


def test_a_function_is_not_hidden_by_a_package_of_its_name() -> None:
    program = (
        "import pkgutil, importlib, hvdrec\n"
        "for module in pkgutil.iter_modules(hvdrec.__path__):\n"
        "    if module.name != '__main__':\n"
        "        importlib.import_module(f'hvdrec.{module.name}')\n"
        "print([name for name in hvdrec.__all__ if type(getattr(hvdrec, name)).__name__ == "
        "'module'])"
    )
    assert _run(program).strip() == "[]"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = hvdrec.trian


def test_a_missing_extra_is_named() -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "import hvdrec\n"
        "try:\n"
        "    hvdrec.evaluate\n"
        "except ModuleNotFoundError as error:\n"
        "    print(error.name, '|', error)"
    )
    name, text = _run(program).split(" | ")
    assert name == "torch"
    assert "hvdrec.evaluate needs 'torch'" in text
    assert "extra 'train'" in text


def test_a_configuration_in_python_equals_the_same_in_toml(tmp_path: Path) -> None:
    file = tmp_path / "small.toml"
    file.write_text(TOML.format(raw="raw", work="work"))
    assert small_config("raw", "work") == load_config(file)


def test_a_configuration_in_python_is_checked() -> None:
    with pytest.raises(hvdrec.UserError) as caught:
        Config(name="wrong", features=(Feature("user_id", max_length=-1),))
    assert "max_length" in caught.value.field
    assert caught.value.value == -1
