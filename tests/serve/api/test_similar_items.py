"""SimilarItems is the cosine of the exported item vectors."""

import grpc
import numpy as np
import pytest

from serve.client import RecommenderClient
from serve.model.directory import Artifact


def test_neighbours_by_cosine(client: RecommenderClient, artifact: Artifact) -> None:
    vectors = artifact.item_vectors[1:].astype(np.float64)
    cosines = vectors @ vectors[6] / np.linalg.norm(vectors, axis=1) / np.linalg.norm(vectors[6])
    nearest = [at for at in np.argsort(-cosines) if at != 6]

    response = client.similar_items(artifact.catalog.item_ids[7], k=5)

    assert [item.item_id for item in response.items] == [artifact.catalog.item_ids[at + 1] for at in nearest[:5]]
    assert [item.similarity for item in response.items] == pytest.approx(cosines[nearest[:5]], abs=1e-5)
    assert response.items[0].title == artifact.catalog.titles[nearest[0] + 1]
    assert tuple(response.items[0].genres) == artifact.catalog.genres[nearest[0] + 1]
    assert response.model_version == artifact.info.model_version


def test_all_others_at_most_and_never_the_item_itself(client: RecommenderClient, artifact: Artifact) -> None:
    item_id = artifact.catalog.item_ids[1]
    ids = [item.item_id for item in client.similar_items(item_id, k=1000).items]
    assert sorted(ids) == sorted(set(artifact.catalog.item_ids) - {"", item_id})
    assert len(client.similar_items(item_id, k=0).items) == 10


def test_unknown_item(client: RecommenderClient, artifact: Artifact) -> None:
    with pytest.raises(grpc.RpcError) as failure:
        client.similar_items("no such film")
    assert failure.value.code() is grpc.StatusCode.NOT_FOUND
    assert failure.value.details() == f"the model {artifact.info.model_version} does not know the item 'no such film'"
