"""Train on many ranks (processes): horovodrun -np 2 python examples/my_train.py CONFIG"""

import sys

import hvdrec

if __name__ == "__main__":
    config = hvdrec.load_config(sys.argv[1])
    result = hvdrec.train(config, overwrite=True)
    print(result.run, result.metric, result.best)
