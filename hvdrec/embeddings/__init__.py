"""The embedding tables of a training job, which are kept outside the PyTorch model.

The modules look up rows, place tables on ranks, exchange rows between ranks, update rows (kernels)
and store tables in files.
"""
