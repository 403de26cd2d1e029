"""Make a mistake on rank 1 alone; every rank prints what it hears of it."""

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
        ranks.together(act)
    except UserError as error:
        print(f"heard {error}", flush=True)
    assert ranks.together(lambda: 7) == 7


if __name__ == "__main__":
    main()
