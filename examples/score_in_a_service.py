"""Answer requests with a bundle; only NumPy and ONNX Runtime need to be installed.

`Scorer.watch` checks the path for a new bundle that is renamed into place. It verifies the new
bundle and uses it for later requests; requests that already run finish with the old one.

usage: python examples/score_in_a_service.py BUNDLE < requests.jsonl

Each line of standard input is one request, for example {"user": "u1", "scene": {"hour": 21}}.
"""

import json
import sys
from typing import Any

from hvdrec.scoring import RequestError, Scorer, WatchedScorer


def answer(scorer: WatchedScorer, request: dict[str, Any]) -> dict[str, Any]:
    """Rank ten items for one request and return them as a JSON object."""
    try:
        items = scorer.recommend(user=request["user"], scene=request.get("scene", {}), k=10)
    except RequestError as error:
        return {"error": str(error), "field": error.field}
    return {"items": [{"item": item.item, "score": item.score} for item in items]}


def main() -> None:
    """Read requests from standard input, one per line, and print the answers."""
    scorer = Scorer.watch(sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(answer(scorer, json.loads(line))), flush=True)
    scorer.close()


if __name__ == "__main__":
    main()
