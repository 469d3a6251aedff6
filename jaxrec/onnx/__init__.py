"""From a trained model to the model directory that `serve` reads: ONNX graphs, catalogue and manifest."""
