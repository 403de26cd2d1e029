"""Refuse graphs that take time or memory without bound, before ONNX Runtime opens them.

ONNX Runtime evaluates constant parts of a graph while it opens the file, so limits at run time come
too late. A graph may use the operators in `RULES`, which have no loops and whose output shapes
follow from the shapes of their inputs. Its tensors are sized for one row, for very many rows and
for very long lists. Sizes may grow in proportion to rows and entries, but not faster.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from hvdrec.scoring.bundle import regular_file
from hvdrec.scoring.errors import invalid_bundle, shown
from hvdrec.scoring.graph_file import Graph, GraphError, Tensor, UnsafeGraphError, parse_model
from hvdrec.scoring.graph_shapes import Sizes

MOST_BYTES = (1 << 31) - 1
"""Size limit of a protobuf message."""
CASES = ((1, 64), (1 << 20, 64), (1, 1 << 20))
"""Numbers of rows and of entries in a list that tensors are sized for."""


def check_graph(folder: Path, name: str, listed: Collection[str]) -> None:
    """Check the operators and the tensors' sizes of a graph without running it.

    Args:
        folder: The bundle's directory.
        name: Name of the graph's file in it.
        listed: Names of the files that the manifest lists.

    Raises:
        BundleError: The file is not a graph, or hvdrec does not run it.
    """
    file = folder / name
    status = regular_file(folder, name)
    try:
        if not 0 < status.st_size <= MOST_BYTES:
            raise GraphError(f"has {status.st_size} bytes")
        with (
            file.open("rb") as opened,
            mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data,
            memoryview(data) as view,
        ):
            graph = parse_model(view)
        _check_external(folder, name, listed, graph)
        for rows, entries in CASES:
            Sizes(rows, entries).check(graph)
    except UnsafeGraphError as error:
        remedy = "do not use this bundle, or change the feature kind that adds the operator"
        raise invalid_bundle(file, str(error), remedy) from None
    except GraphError as error:
        problem = f"is not a readable graph ({error})"
        raise invalid_bundle(file, problem) from None
    except OSError as error:
        raise invalid_bundle(file, f"cannot be read ({error})", "check its permissions") from None


def _all_tensors(graph: Graph) -> Iterator[Tensor]:
    yield from graph.tensors.values()
    for node in graph.nodes:
        yield from node.tensors.values()
        for branch in node.graphs:
            yield from _all_tensors(branch)


def _check_external(folder: Path, name: str, listed: Collection[str], graph: Graph) -> None:
    """Check that external weights are in the listed file beside the graph, each byte used once."""
    used: Counter[str] = Counter()
    for tensor in _all_tensors(graph):
        if tensor.external is None:
            continue
        location, offset, size = tensor.external
        if location != f"{name}.data" or location not in listed:
            raise GraphError(
                f"keeps weights in {shown(location)}, expected the listed file '{name}.data'"
            )
        used[location] += size
        held = regular_file(folder, location).st_size
        if offset + size > held or used[location] > held:
            raise GraphError(f"needs more weights than the {held} bytes of '{location}'")
