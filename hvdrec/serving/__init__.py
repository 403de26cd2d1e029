"""The HTTP service that ``hvdrec serve`` starts; needs the extra ``serve``.

>>> from hvdrec.serving import Options, serve
>>> serve(Options(Path("bundle"), port=8080, workers=2))  # doctest: +SKIP
"""

from hvdrec.errors import UserError
from hvdrec.serving.options import Options, add_arguments, from_arguments

__all__ = ["Options", "add_arguments", "from_arguments", "serve"]


def serve(options: Options) -> None:
    """Serve a bundle until SIGTERM or SIGINT, then finish the requests in progress.

    Call it in the main thread of a process, since it handles signals.

    Raises:
        UserError: The port is not available, or the extra ``serve`` is not installed.
        BundleError: The bundle cannot be opened.
        StoreError: The embedding store does not reply.
    """
    try:
        from hvdrec.serving.run import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "hvdrec":
            raise
        raise UserError(
            f"{error.name}: not installed; serving needs the extra 'serve': "
            "pip install 'hvdrec[serve]'"
        ) from None
    run(options)
