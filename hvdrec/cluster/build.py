"""What the installed Horovod was built with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HorovodBuild:
    """Which transports Horovod's torch binding holds; Horovod need not be initialised to tell."""

    mpi: bool
    gloo: bool
    nccl: bool


def horovod_build() -> HorovodBuild:
    """Return what Horovod was built with.

    Raises ImportError where Horovod is not installed or was not built for torch, and OSError where
    a library it was linked with is not found.
    """
    import horovod.torch as hvd

    return HorovodBuild(
        mpi=bool(hvd.mpi_built()), gloo=bool(hvd.gloo_built()), nccl=bool(hvd.nccl_built())
    )
