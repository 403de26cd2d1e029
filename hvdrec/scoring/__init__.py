"""The slim module: opens a bundle and ranks items with numpy and onnxruntime alone.

>>> from hvdrec.scoring import Scorer
>>> scorer = Scorer.load("bundle/")  # doctest: +SKIP
>>> scorer.score(user="1", items=["1193", "661"], scene={"hour": 21})  # doctest: +SKIP
>>> scorer.recommend(user="1", scene={"hour": 21}, k=20)  # doctest: +SKIP
"""

from hvdrec.scoring.candidates import Recommendation
from hvdrec.scoring.errors import BundleError, RequestError, ScoringError, StoreError
from hvdrec.scoring.explanation import Explanation, HistoryEffect
from hvdrec.scoring.scorer import Scorer, WatchedScorer

__all__ = [
    "BundleError",
    "Explanation",
    "HistoryEffect",
    "Recommendation",
    "RequestError",
    "Scorer",
    "ScoringError",
    "StoreError",
    "WatchedScorer",
]
