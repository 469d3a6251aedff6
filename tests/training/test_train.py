"""Training: it learns what is there and nothing that is not, it repeats, resumes and splits over devices exactly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from jaxrec.config import ModelConfig, PrepareConfig, TrainConfig
from jaxrec.data.batches import TrainBatch, TrainingData
from jaxrec.data.events import Events
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.errors import TrainingError
from jaxrec.evaluation.metrics import hit_rate
from jaxrec.evaluation.ranking import rank_cases
from jaxrec.evaluation.scorers import sequence_scorer
from jaxrec.models.sequence import TimeRatingAwareContentModel, TimeRatingAwareLSTM
from jaxrec.training.loop import TrainedModel, load_trained, steps_key, train_model
from jaxrec.training.sharding import data_mesh
from jaxrec.training.step import initial_state, make_optimizer, make_train_step, seen_items, training_loss
from tests.synthetic import markov_log, random_log, shuffled_items

ITEMS = 40
MODEL = ModelConfig(embedding=16, hidden=32, max_length=16, input_dropout=0.0, output_dropout=0.1)
TRAIN = TrainConfig(max_epochs=12, patience=12, batch_tokens=256, learning_rate=1e-2)
KEEP_ALL = PrepareConfig(min_user_ratings=1, min_movie_ratings=1)


def hits_at_3(data: PreparedData, model: TimeRatingAwareLSTM) -> np.ndarray:
    ranks = rank_cases(sequence_scorer(model), data, data.split.test, 16, request_time=False).ranks
    return hit_rate(ranks, 3)


@pytest.mark.parametrize("shuffled", [False, True])
def test_learns_a_markov_log_and_nothing_from_a_shuffled_one(tmp_path: Path, shuffled: bool) -> None:
    log = markov_log(users=250, items=ITEMS, events=12, stay=0.9, seed=0)
    data = prepare(shuffled_items(log, seed=1) if shuffled else log, None, KEEP_ALL)
    model = TimeRatingAwareLSTM(ITEMS, MODEL, rngs=nnx.Rngs(0))
    hits = hits_at_3(data, train_model(model, data, TRAIN, tmp_path, "test").model)
    if shuffled:
        chance = 3 / (ITEMS - 11)  # at least 29 items are no history of a user
        assert hits.mean() < chance + 4 * np.sqrt(chance * (1 - chance) / len(hits))
    else:
        assert hits.mean() > 0.75  # at best 0.9 and a little


@pytest.fixture(scope="module")
def data() -> PreparedData:
    return prepare(random_log(users=40, items=20, max_events=20, seed=5), None, KEEP_ALL)


def train(data: PreparedData, folder: Path, max_epochs: int = 4, seed: int = 0) -> TrainedModel[TimeRatingAwareLSTM]:
    config = TrainConfig(seed=seed, max_epochs=max_epochs, patience=99, batch_tokens=64)
    return train_model(TimeRatingAwareLSTM(20, MODEL, rngs=nnx.Rngs(seed)), data, config, folder, "test")


def curve(trained: TrainedModel[TimeRatingAwareLSTM]) -> list[tuple[float, float]]:
    return [(record["loss"], record["validation_ndcg_10"]) for record in trained.epochs]


def variables(model: TimeRatingAwareLSTM) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model)))]


def test_same_seed_same_curve(data: PreparedData, tmp_path: Path) -> None:
    first, again, other = (curve(train(data, tmp_path / str(i), seed=seed)) for i, seed in enumerate((0, 0, 1)))
    assert first == again
    assert first != other


class _Killed(Exception):
    pass


def test_a_resumed_run_equals_one_that_never_stopped(
    data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(data, tmp_path / "whole")
    epoch, calls = TrainingData.epoch, iter(range(100))

    def killed_in_the_third(self: TrainingData, *arguments: int) -> object:
        if next(calls) == 2:
            raise _Killed
        return epoch(self, *arguments)

    monkeypatch.setattr(TrainingData, "epoch", killed_in_the_third)
    with pytest.raises(_Killed):
        train(data, tmp_path / "stopped")
    monkeypatch.undo()
    assert len((tmp_path / "stopped/log.jsonl").read_text().splitlines()) == 2
    resumed = train(data, tmp_path / "stopped")
    assert curve(resumed) == curve(whole)
    for ours, theirs in zip(variables(resumed.model), variables(whole.model), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_best_epoch_is_kept_and_loaded(data: PreparedData, tmp_path: Path) -> None:
    trained = train(data, tmp_path)
    config = TrainConfig(max_epochs=4, patience=99, batch_tokens=64)
    loaded = load_trained(TimeRatingAwareLSTM(20, MODEL, rngs=nnx.Rngs(9)), config, tmp_path)
    assert loaded.epochs == trained.epochs
    for ours, theirs in zip(variables(loaded.model), variables(trained.model), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_early_stopping(data: PreparedData, tmp_path: Path) -> None:
    config = TrainConfig(max_epochs=50, patience=2, batch_tokens=64)
    epochs = train_model(TimeRatingAwareLSTM(20, MODEL, rngs=nnx.Rngs(0)), data, config, tmp_path, "test").epochs
    figures = [record["validation_ndcg_10"] for record in epochs]
    assert len(epochs) < 50
    assert int(np.argmax(figures)) == len(epochs) - 3  # two epochs without a better one


def test_a_loss_that_is_not_finite_stops_with_the_step(data: PreparedData, tmp_path: Path) -> None:
    model = TimeRatingAwareLSTM(20, MODEL, rngs=nnx.Rngs(0))
    model.item_embedding[...] = model.item_embedding[...] * np.inf
    with pytest.raises(TrainingError, match=r"is not finite at step 0 \(epoch 0\); no checkpoint was made yet"):
        train_model(model, data, TRAIN, tmp_path, "test")


def test_models_of_a_run_share_no_key_with_each_other_or_with_the_initialization() -> None:
    rngs = nnx.Rngs(0)
    keys = [rngs.params() for _ in range(20)]
    keys += [jax.random.fold_in(steps_key(0, name), step) for name in ("a", "b") for step in range(20)]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 60


def test_the_step_compiles_once_and_the_genres_stay_fixed() -> None:
    data = prepare(random_log(users=40, items=20, max_events=20, seed=5), None, KEEP_ALL)
    windows = TrainingData(data, max_length=8, batch_tokens=64)
    genres = np.eye(21, 4, dtype=np.float32)
    optimizer = make_optimizer(TRAIN, 100)
    graphdef, state = initial_state(TimeRatingAwareContentModel(20, genres, MODEL, rngs=nnx.Rngs(0)), optimizer)
    mesh = data_mesh()
    state = jax.device_put(state, jax.NamedSharding(mesh, jax.P()))
    step = make_train_step(graphdef, optimizer, mesh, 0.5)
    for batch in (batch for epoch in range(3) for batch in windows.epoch(0, epoch)):
        state, _ = step(state, batch, jax.random.key(0))
    assert step._cache_size() == 1  # type: ignore[attr-defined]
    np.testing.assert_array_equal(nnx.merge(graphdef, state.params, state.fixed).genre_matrix[...], genres)


SHARDED = """
import json, sys
from pathlib import Path
import jax
from flax import nnx
from jaxrec.data.batches import TrainingData
from jaxrec.config import ModelConfig, PrepareConfig, TrainConfig
from jaxrec.models.sequence import TimeRatingAwareLSTM
from jaxrec.data.prepare import prepare
from jaxrec.training.sharding import data_mesh
from jaxrec.training.step import initial_state, make_optimizer, make_train_step
from tests.synthetic import random_log

assert len(jax.devices()) == 8
data = prepare(random_log(users=40, items=20, max_events=20, seed=5), None, PrepareConfig(1, 1))
windows = TrainingData(data, max_length=8, batch_tokens=64, multiple_of=8)
losses = {}
for count in (1, 8):
    mesh = data_mesh(jax.devices()[:count])
    optimizer = make_optimizer(TrainConfig(), 100)
    model = TimeRatingAwareLSTM(20, ModelConfig(embedding=16, hidden=32), rngs=nnx.Rngs(0))
    graphdef, state = initial_state(model, optimizer)
    state = jax.device_put(state, jax.NamedSharding(mesh, jax.P()))
    step = make_train_step(graphdef, optimizer, mesh, 0.5)
    losses[count] = []
    for batch in windows.epoch(0, 0):
        batch = jax.device_put(batch, jax.NamedSharding(mesh, jax.P("data")))
        state, metrics = step(state, batch, jax.random.key(0))
        losses[count].append(float(metrics["loss"]))
print(json.dumps(losses))
"""


def test_eight_devices_give_the_loss_of_one() -> None:
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    result = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr.decode()
    losses = json.loads(result.stdout)
    assert len(losses["1"]) == 5
    np.testing.assert_allclose(losses["8"], losses["1"], atol=1e-5)


def test_the_softmax_leaves_out_what_the_window_has_shown() -> None:
    """Two windows in a row, abca and bda, and a place of padding; before both come e and c. What a position has
    seen, without its target."""
    a, b, c, d, e = 1, 2, 3, 4, 5
    item = np.array([[a, b, c, b, d, 0]], np.int32)
    target = np.array([[b, c, a, d, a, 0]], np.int32)
    nothing = np.zeros(item.shape, np.float32)
    starts = np.array([[True, False, False, True, False, False]])
    batch = TrainBatch(Events(item, nothing, nothing, np.array([5])), starts, target, nothing, np.array([[c, e, 0]]))
    seen = [set(row.tolist()) - {0} for row in np.asarray(seen_items(batch))[0]]
    assert seen[:5] == [{a, c, e}, {a, b, e}, {b, c, e}, {b, c, e}, {b, c, d, e}]


def test_items_without_training_events_are_no_candidates(data: PreparedData) -> None:
    """Their vectors and biases do not change the loss and get no gradient; those of another item do."""
    batch = next(TrainingData(data, max_length=16, batch_tokens=64).epoch(0, 0))
    missing, present = 20, int(batch.target[0, 0])
    trained_items = np.arange(21) != missing
    batch = batch._replace(
        events=batch.events._replace(item=np.where(batch.events.item == missing, present, batch.events.item)),
        target=np.where(batch.target == missing, present, batch.target),
    )
    model = TimeRatingAwareLSTM(20, MODEL, rngs=nnx.Rngs(0))
    graphdef, variables = nnx.split(model)

    @jax.jit
    def loss(variables: nnx.State) -> jax.Array:
        return training_loss(nnx.merge(graphdef, variables), batch, jax.random.key(0), 0.5, trained_items=trained_items)

    of_loss = jax.grad(loss)(variables)
    for gradient in (of_loss["item_embedding"][...], of_loss["item_bias_table"][...]):
        np.testing.assert_array_equal(gradient[missing], 0.0)
        assert np.abs(gradient[present]).max() > 0
    before = float(loss(variables))
    model.item_bias_table[...] = model.item_bias_table[...].at[missing].set(5.0)
    assert float(loss(nnx.state(model))) == before
    model.item_bias_table[...] = model.item_bias_table[...].at[present].set(5.0)
    assert float(loss(nnx.state(model))) != before
