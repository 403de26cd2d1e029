"""float16 and int8 embeddings and int8 ranker layers: sizes, rounding, refused values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from hvdrec.config.sections import Ranker, Tower
from hvdrec.errors import UserError
from hvdrec.exporting.precision import compressed, quantize_ranker, restored
from hvdrec.exporting.ranker_graph import core
from hvdrec.features.graph import output_name
from tests.small_model import small_config, small_model


def test_int8_by_hand() -> None:
    stored, scales = compressed(np.array([[1.0, -2.54, 0.0], [0.0, 0.0, 0.0]], np.float32), "int8")
    assert stored.dtype == np.int8 and stored.tolist() == [[50, -127, 0], [0, 0, 0]]
    assert scales is not None and scales.dtype == np.float32
    np.testing.assert_allclose(scales, [0.02, 1 / 127], rtol=1e-6)
    np.testing.assert_allclose(restored(stored, scales), [[1.0, -2.54, 0], [0, 0, 0]], atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "bound"), [("float32", 0.0), ("float16", 2**-11), ("int8", 1 / 254)]
)
def test_rounding_is_within_half_a_step(kind: str, bound: float) -> None:
    embeddings = np.random.default_rng(0).normal(size=(200, 16)).astype(np.float32)
    stored, scales = compressed(embeddings, kind)
    assert stored.dtype == np.dtype(kind)
    error = np.abs(restored(stored, scales) - embeddings)
    assert (error <= np.abs(embeddings).max(axis=1, keepdims=True) * bound * 1.001).all()


def test_values_too_large_for_float16_are_refused() -> None:
    with pytest.raises(UserError, match="an embedding holds 70000, float16 ends at 65504"):
        compressed(np.array([[7e4]], np.float32), "float16")


def _ranker(file: Path, hidden: tuple[int, ...]) -> Path:
    config = small_config("ranking")
    shape = replace(config.model, tower=Tower(output=16), ranker=Ranker(hidden=hidden))
    model = small_model(replace(config, model=shape)).float().eval()
    onnx.save(core(model), str(file))
    return file


def _scores(file: Path) -> np.ndarray:
    random = torch.Generator().manual_seed(0)
    inputs = {
        "user_embedding": torch.randn(1, 16, generator=random).numpy(),
        "item_embedding": torch.randn(50, 16, generator=random).numpy(),
        "request": np.zeros(50, np.int64),
        output_name("hour"): np.array([2]),
        output_name("shop"): np.array([3]),
    }
    return np.asarray(onnxruntime.InferenceSession(str(file)).run(["score"], inputs)[0])


def test_inner_layers_become_int8_and_scores_stay_near(tmp_path: Path) -> None:
    file = _ranker(tmp_path / "ranker.onnx", (64, 32))
    before, size = _scores(file), file.stat().st_size
    quantize_ranker(file)
    graph = onnx.load(str(file)).graph
    assert [n.op_type for n in graph.node].count("MatMulInteger") == 1
    assert file.stat().st_size < size
    after = _scores(file)
    assert 0 < np.abs(after - before).max() < 0.02


def test_a_ranker_without_inner_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the ranker has no inner layer"):
        quantize_ranker(_ranker(tmp_path / "ranker.onnx", (16,)))
