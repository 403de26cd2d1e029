"""The commands of the command line: their help, examples and errors."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hvdrec.cli import main
from hvdrec.cli.parser import COMMANDS, EPILOG, parse
from hvdrec.errors import UserError

TEMPLATE = Path(__file__).parents[2] / "configs" / "template.toml"


def example_lines(text: str) -> list[str]:
    """Return the command lines of an example, without a launcher in front."""
    joined = text.replace("\\\n", " ")
    lines = [line.partition("  # ")[0].strip() for line in joined.splitlines()]
    return [line[line.index("hvdrec ") :] for line in lines if "hvdrec " in line]


def help_of(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_the_help_of_each_command_ends_in_an_example_that_parses(
    command: object, capsys: pytest.CaptureFixture[str]
) -> None:
    name = command.name  # type: ignore[attr-defined]
    text = help_of(name, capsys=capsys)
    examples = example_lines(text.rpartition("example:\n")[2])
    assert examples
    for line in examples:
        assert parse(shlex.split(line)[1:]).command.name == name


def test_the_main_help_ends_in_examples_that_parse(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys=capsys)
    assert text.rstrip().endswith(EPILOG.splitlines()[-1])
    assert {command.name for command in COMMANDS} <= set(text.split())
    examples = example_lines(EPILOG.partition("ranked items:\n")[2])
    assert len(examples) == 9
    for line in examples:
        parse(shlex.split(line)[1:])


def test_the_help_of_a_command_with_a_configuration_lists_its_fields(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = " ".join(help_of("train", str(TEMPLATE), capsys=capsys).split())
    assert "--resume" in text
    assert "--train.objective {retrieval,ranking,joint}" in text
    assert "--paths.work TEXT" in text
    assert "(default: runs/my-data)" in text
    text = help_of("export", capsys=capsys)
    assert "--export.embeddings {float32,float16,int8}" in text
    assert "--train" not in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["COMMAND"]),
        (["trian", "x.toml"], ["trian", "train"]),
        (["train"], ["config", "hvdrec train --help"]),
        (["train", "x.toml", "--epochs", "3"], ["--epochs"]),
        (["evaluate", "run", "--train.epochs", "3"], ["--train.epochs"]),
        (["evaluate", "run", "--split", "train"], ["--split", "validation", "test"]),
        (["recommend", "bundle", "--user", "1", "-k", "x"], ["-k", "int"]),
        (["recommend", "s3://b/x", "--user", "1"], ["s3://b/x", "hvdrec fetch"]),
        (["evaluate", "s3://b/run"], ["s3://b/run", "directory of this machine"]),
        (["train", "no-such-file.toml", "--help"], ["no-such-file.toml", "no such file"]),
    ],
)
def test_refuses_wrong_arguments_in_one_line_with_exit_code_2(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("hvdrec: error: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error


def test_an_abbreviated_option_is_not_accepted() -> None:
    with pytest.raises(UserError, match="--over"):
        parse(["train", "x.toml", "--over"])


def test_help_and_a_command_for_a_bundle_import_neither_torch_nor_the_configuration() -> None:
    program = (
        "import sys, json\n"
        "from hvdrec.cli.parser import parse\n"
        "parse(['recommend', 'bundle', '--user', '1', '--scene', 'hour=3', '--json'])\n"
        "print(json.dumps([name.split('.')[0] for name in sys.modules]))\n"
        "print('hvdrec.config' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    modules, has_config = done.stdout.splitlines()
    heavy = {"torch", "pydantic", "pyarrow", "pandas", "horovod", "duckdb"}
    assert not heavy & set(json.loads(modules))
    assert has_config == "False"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert re.fullmatch(r"hvdrec \d+\.\d+\.\d+\n", capsys.readouterr().out)
