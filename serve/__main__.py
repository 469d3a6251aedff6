"""`python -m serve`."""

import os

# Before NumPy is loaded: OpenBLAS keeps its threads spinning for some 20 ms after every product, which cost
# SimilarItems 15 times its own CPU (27 ms a call on two cores). Here it is many calls at once that fill the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# And faiss' threads of OpenMP, which spin too: batches from an index took 23 to 60 times the CPU.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from serve.cli.main import main

main(prog_name="python -m serve")
