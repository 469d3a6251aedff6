"""Learning to rerank: held-out decisions by cross-fitting, the loss, and the gate."""
