"""Raise an error on rank 1 alone; every rank prints the error it gets."""

from __future__ import annotations

from hvdrec.errors import UserError
from hvdrec.parallel import ranks


def main() -> None:
    world = ranks.init()

    def act() -> int:
        if world.rank == 1:
            raise UserError("a file is missing")
        return world.rank

    try:
        ranks.run_on_all(act)
    except UserError as error:
        print(f"raised {error}", flush=True)
    assert ranks.run_on_all(lambda: 7) == 7


if __name__ == "__main__":
    main()
