"""A request handler over a bundle, with nothing but NumPy and ONNX Runtime installed.

`Scorer.watch` follows the path: when a new bundle is renamed into place, it is verified and
swapped in, and requests under way end on the old one.

usage: python examples/score_in_a_service.py BUNDLE < requests.jsonl

Each line of standard input is one request, for example {"user": "u1", "scene": {"hour": 21}}.
"""

import json
import sys
from typing import Any

from hvdrec.scoring import RequestError, Scorer, WatchedScorer


def answer(scorer: WatchedScorer, request: dict[str, Any]) -> dict[str, Any]:
    """Rank ten items for one request."""
    try:
        items = scorer.recommend(user=request["user"], scene=request.get("scene", {}), k=10)
    except RequestError as error:
        return {"error": str(error), "field": error.field}
    return {"items": [{"item": item.item, "score": item.score} for item in items]}


def main() -> None:
    """Answer the requests of standard input."""
    scorer = Scorer.watch(sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(answer(scorer, json.loads(line))), flush=True)
    scorer.close()


if __name__ == "__main__":
    main()
