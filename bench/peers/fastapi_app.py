"""The plainest JSON service: FastAPI on uvicorn, `sequence.onnx` run inline.

CATALOG_ROWS=N python fastapi_app.py SEQUENCE_ONNX PORT

N is the number of items and 1, of the row of padding.
"""

import os
import sys

import numpy as np
import onnxruntime
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel


class Request(BaseModel):
    """One history's features, as the graph's contract has them."""

    item: list[int]
    rating: list[float]
    gap: list[float]
    request_gap: float
    exclude: list[int]
    k: int


def application(graph: str) -> FastAPI:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    app = FastAPI()
    rows = int(os.environ["CATALOG_ROWS"])
    constant = {"trend": np.zeros(rows, np.float32), "blocked": np.zeros((1, rows), bool)}

    @app.post("/recommend")
    async def recommend(request: Request) -> dict[str, list[int] | list[float]]:
        items, scores = session.run(
            ["items", "scores"],
            {
                "item": np.array([request.item], np.int32),
                "rating": np.array([request.rating], np.float32),
                "gap": np.array([request.gap], np.float32),
                "length": np.array([len(request.item)], np.int32),
                "request_gap": np.array([request.request_gap], np.float32),
                "exclude": np.array([request.exclude], np.int32),
                "k": np.array([request.k], np.int64),
                **constant,
            },
        )
        return {"items": items[0].tolist(), "scores": scores[0].tolist()}

    return app


if __name__ == "__main__":
    uvicorn.run(
        application(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]), log_level="warning", access_log=False
    )
