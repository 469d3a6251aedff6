"""Serves an exported model directory over gRPC with ONNX Runtime.

Meets `jaxrec` at the model directory only: nothing here imports jaxrec, jax, flax
or tensorflow.
"""
