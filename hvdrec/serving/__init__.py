"""HTTP around a scorer: `hvdrec serve BUNDLE`, or `serve` from Python; needs the extra `serve`.

from hvdrec.serving import Options, serve
serve(Options(Path("bundle"), port=8080, workers=2))
"""

from hvdrec.errors import UserError
from hvdrec.serving.options import Options, add_arguments, from_arguments

__all__ = ["Options", "add_arguments", "from_arguments", "serve"]


def serve(options: Options) -> None:
    """Serve a bundle until SIGTERM or SIGINT; requests that are in work then end first.

    Only for a process's main thread. Raises UserError for a port that cannot be had and where the
    extra is missing, BundleError for a bundle that cannot be opened, StoreError where the
    embeddings' store does not answer.
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
