"""MLServer's runtime for `sequence.onnx`: one request, one run."""

import os

import numpy as np
import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Graph(MLModel):
    async def load(self) -> bool:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        uri = self.settings.parameters.uri
        self.session = onnxruntime.InferenceSession(uri, options, providers=["CPUExecutionProvider"])
        rows = int(os.environ["CATALOG_ROWS"])
        self.constant = {"trend": np.zeros(rows, np.float32), "blocked": np.zeros((1, rows), bool)}
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        feed = {one.name: NumpyCodec.decode_input(one) for one in payload.inputs}
        feed["request_gap"], feed["k"] = feed["request_gap"][:, 0], feed["k"][0]
        feed["length"] = np.full(len(feed["item"]), feed["item"].shape[1], np.int32)
        outputs = zip(("items", "scores"), self.session.run(["items", "scores"], feed | self.constant), strict=True)
        return InferenceResponse(
            model_name=self.name, outputs=[NumpyCodec.encode_output(name, values) for name, values in outputs]
        )
