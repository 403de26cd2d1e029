"""A user's script: ``horovodrun -np 2 python my_train.py CONFIG RUN``."""

import json
import sys

import hvdrec

config = hvdrec.load_config(sys.argv[1], {"paths.run": sys.argv[2], "train.epochs": 1})
result = hvdrec.train(config)
report = hvdrec.evaluate(result.run, split="validation", baselines=False)
print(json.dumps({"train": result.to_dict(), "report": report.to_dict()}))
