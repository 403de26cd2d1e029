"""Refuse graphs that could take unlimited time or memory, before ONNX Runtime opens them.

ONNX Runtime evaluates constant parts of a graph while it opens the file, so a limit at run time
would come too late. A graph may use only the operators in `RULES`: they contain no loops, and the
shapes of their outputs follow from those of their inputs. The sizes of all tensors are computed for
one row, for very many rows and for very long lists. The sizes may grow in proportion to the number
of rows and of list entries, but not faster.
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
"""Largest size of a protobuf message, in bytes."""
CASES = ((1, 64), (1 << 20, 64), (1, 1 << 20))
"""Pairs (rows, list entries) for which the sizes of tensors are computed."""


def check_graph(folder: Path, name: str, listed: Collection[str]) -> None:
    """Check the operators of a graph and the sizes of its tensors without running it.

    Args:
        folder: Directory of the bundle.
        name: File name of the graph in the bundle.
        listed: Names of the files that the manifest lists.

    Raises:
        BundleError: The file is not a graph, or the graph is not safe to run.
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
    """Check that external weights are in the graph's own file, which is listed, and fit in it."""
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
