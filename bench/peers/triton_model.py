"""`model.py` of Triton's Python backend: runs `sequence.onnx` once for all requests that the batcher hands over.

All requests of a batch have histories of one length, since Triton's dynamic batcher joins only like shapes.
"""

import os
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

COLUMNS = ("item", "rating", "gap", "exclude")


class TritonPythonModel:
    def initialize(self, args):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        graph = Path(args["model_repository"]) / args["model_version"] / "sequence.onnx"
        self.session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])

        rows = int(os.environ["CATALOG_ROWS"])
        self.constant = {"trend": np.zeros(rows, np.float32), "blocked": np.zeros((1, rows), bool)}

    def execute(self, requests):
        tensors = [
            {
                name: pb_utils.get_input_tensor_by_name(request, name).as_numpy()
                for name in (*COLUMNS, "request_gap", "k")
            }
            for request in requests
        ]
        feed = {name: np.concatenate([one[name] for one in tensors]) for name in COLUMNS}
        feed["request_gap"] = np.concatenate([one["request_gap"] for one in tensors])[:, 0]
        feed["length"] = np.full(len(feed["item"]), feed["item"].shape[1], np.int32)
        feed["k"] = np.array([max(int(one["k"].max()) for one in tensors)], np.int64)
        items, scores = self.session.run(["items", "scores"], feed | self.constant)
        responses, start = [], 0
        for one in tensors:
            end = start + len(one["item"])
            k = int(one["k"].max())
            responses.append(
                pb_utils.InferenceResponse(
                    [
                        pb_utils.Tensor("items", items[start:end, :k]),
                        pb_utils.Tensor("scores", scores[start:end, :k]),
                    ]
                )
            )
            start = end
        return responses
