"""From a trained model to the model directory that `serve` reads: ONNX graphs, catalogue and manifest."""

import os

# From version 1.29 on ONNX Runtime reports to its maker how it is used, unless this is set before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
