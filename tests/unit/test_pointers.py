"""The files `latest` and `best` of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvdrec.errors import UserError
from hvdrec.storage.artifacts import write_artifact
from hvdrec.training.pointers import find_checkpoint, remove_old, write_pointer


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (2, 3, 4):
        with write_artifact(tmp_path / f"checkpoints/step-{step:08d}", "checkpoint") as draft:
            (draft / "model").write_text(str(step))
    write_pointer(tmp_path, "latest", "step-00000003")
    write_pointer(tmp_path, "best", "step-00000002")
    return tmp_path


@pytest.mark.parametrize("which", ["latest", "best"])
def test_every_flipped_bit_of_a_pointer_is_named_or_without_effect(run: Path, which: str) -> None:
    data = (run / which).read_bytes()
    expected = find_checkpoint(run, which).name
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        (run / which).write_bytes(changed)
        try:
            assert find_checkpoint(run, which).name == expected
        except UserError as error:
            assert error.field == str(run / which)


@pytest.mark.parametrize("content", [b"", b"step-00\xb00002", b"/etc/passwd", b"step-2", b"\0" * 9])
def test_a_damaged_pointer_is_named_and_its_remedy_works(run: Path, content: bytes) -> None:
    (run / "latest").write_bytes(content)
    with pytest.raises(UserError, match=r"write one of \[step-0.* into it") as error:
        find_checkpoint(run, "latest")
    assert error.value.field == str(run / "latest")
    (run / "latest").write_text("step-00000004")
    assert find_checkpoint(run, "latest").name == "step-00000004"


def test_a_dangling_latest_falls_back_to_the_newest_complete_checkpoint(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pointer(run, "latest", "step-00000009")
    (run / "checkpoints/step-00000004/model").unlink()
    assert find_checkpoint(run, "latest").name == "step-00000003"
    assert "using step-00000003, the newest complete" in capsys.readouterr().err
    write_pointer(run, "best", "step-00000009")
    with pytest.raises(UserError, match="names 'step-00000009', which is missing"):
        find_checkpoint(run, "best")


def test_removal_keeps_the_named_checkpoints(run: Path) -> None:
    remove_old(run, 1)
    assert len(list((run / "checkpoints").iterdir())) == 3
    write_pointer(run, "best", "step-00000003")
    remove_old(run, 1)
    names = [path.name for path in sorted((run / "checkpoints").iterdir())]
    assert names == ["step-00000003", "step-00000004"]
