"""Run tasks in the executors of Spark."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

from hvdrec.errors import UserError, invalid_value
from hvdrec.parallel.pool import Result, Task, WorkerPool

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import SparkSession

TASKS_PER_SLOT = 4
"""Number of tasks in one Spark job for each slot of the cluster. Progress is shown after each
job."""


@contextmanager
def spark_session(name: str) -> Iterator[SparkSession]:
    """Yield the active session, or start one and stop it at the end.

    ``spark-submit``, ``spark-defaults.conf`` and the variable PYSPARK_SUBMIT_ARGS choose the
    cluster; by default, Spark uses all cores of this machine.

    Args:
        name: Name of the application, which the cluster's pages show.

    Raises:
        UserError: PySpark or Java is missing, or a setting of Spark does not work with hvdrec.
    """
    try:
        from pyspark.sql import SparkSession
    except ImportError:
        remedy = "pip install 'hvdrec[spark]'"
        raise invalid_value("engine", "spark", "PySpark is not installed", remedy) from None
    active = SparkSession.getActiveSession()
    if active is None and not (os.environ.get("JAVA_HOME") or shutil.which("java")):
        remedy = "install it (on Debian: apt-get install openjdk-17-jre-headless) or set JAVA_HOME"
        raise invalid_value("engine", "spark", "Java is not installed", remedy)
    # By default, executors would start the system's python3 instead of this Python.
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = SparkSession.builder.appName(name).config("spark.ui.showConsoleProgress", "false")
    session = active or builder.getOrCreate()
    try:
        if session.conf.get("spark.speculation", "false") == "true":
            problem = "two copies of a task would write the same file at a time"
            raise invalid_value("spark.speculation", "true", problem, "set it to false")
        yield session
    finally:
        if active is None:
            session.stop()


class SparkPool(WorkerPool):
    """Runs each task in an executor. All executors must see the directories that tasks use.

    Attributes:
        session: The session of Spark.
    """

    def __init__(self, session: SparkSession) -> None:
        """Create a pool on a session's executors."""
        super().__init__()
        self.session = session

    def map(
        self, function: Callable[[Task], Result], tasks: Iterable[Task]
    ) -> Generator[Result, None, None]:
        """Yield the result of each task, in the order of the tasks.

        Raises:
            UserError: A job of Spark has failed.
            Exception: The error of the first task that failed.
        """
        remaining = iter(tasks)
        size = TASKS_PER_SLOT * max(1, self.session.sparkContext.defaultParallelism)
        while wave := list(islice(remaining, size)):
            for result, error in self._run(function, wave):
                if error is not None:
                    raise error
                yield result

    def _run(
        self, function: Callable[[Task], Result], tasks: list[Task]
    ) -> list[tuple[Any, Exception | None]]:
        """Run tasks in one job; return the result or the error of each."""
        texts = [pickle.dumps(task) for task in tasks]

        def work(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            import pyarrow as pa

            for batch in batches:
                for number in batch.column("id").to_pylist():
                    outcome = pickle.dumps(_outcome(function, pickle.loads(texts[number])))
                    yield pa.RecordBatch.from_pydict({"id": [number], "outcome": [outcome]})

        # One task in each partition.
        numbers = self.session.range(0, len(tasks), 1, len(tasks))
        with spark_errors():
            table = numbers.mapInArrow(work, "id long, outcome binary").toArrow()
        outcomes = dict(zip(table["id"].to_pylist(), table["outcome"].to_pylist(), strict=True))
        return [pickle.loads(outcomes[number]) for number in range(len(tasks))]


@contextmanager
def spark_errors() -> Iterator[None]:
    """Turn errors of Spark in the ``with`` body into a UserError of one line."""
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    try:
        yield
    except (PySparkException, Py4JError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # A Python error in an executor comes with its traceback, whose last line names the error.
        named = [line for line in lines if "Error: " in line and not line.startswith("at ")]
        reason = (named or lines or [type(error).__name__])[-1 if named else 0]
        text = f"engine = 'spark': a job failed: {reason[:500]}; Spark's log says more"
        raise UserError(text, field="engine", value="spark") from error


def _outcome(
    function: Callable[[Task], Result], task: Task
) -> tuple[Result | None, Exception | None]:
    try:
        return function(task), None
    except UserError as error:
        return None, error
