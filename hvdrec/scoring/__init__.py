"""The slim module: opens a bundle and ranks items; needs numpy and onnxruntime, nothing else.

from hvdrec.scoring import Scorer
scorer = Scorer.load("bundle/")
scorer.score(user="1", items=["1193", "661"], scene={"hour": 21, "weekday": 4})
scorer.recommend(user="1", scene={"hour": 21, "weekday": 4}, k=20)
"""

from hvdrec.scoring.candidates import Recommendation
from hvdrec.scoring.errors import BundleError, RequestError, ScoringError, StoreError
from hvdrec.scoring.scorer import Scorer

__all__ = ["BundleError", "Recommendation", "RequestError", "Scorer", "ScoringError", "StoreError"]
