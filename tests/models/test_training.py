import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from models import metrics
from models.compilation import jit
from models.data import Interactions, drifting_interests
from models.losses import binary_cross_entropy
from models.registry import make_model
from models.training import compare, loop
from models.training.config import OPTIMIZERS, TrainConfig
from models.training.files import read_history, write_json
from models.training.optimizers import make_optimizer

CONFIG = TrainConfig(
    max_length=8, embedding_dim=8, num_blocks=1, epochs=6, batch_size=20, eval_every=2, learning_rate=1e-2, seed=1
).resolved()


@pytest.fixture(scope="module")
def prepared():
    return loop.prepare(drifting_interests(num_users=60, num_items=40, num_groups=5, seed=3), CONFIG)


def start(prepared, optimizer):
    model = make_model(CONFIG, num_items=40, max_length=8, seed=1)
    graphdef, params = nnx.split(model, nnx.Param)
    tx = make_optimizer(optimizer, CONFIG, prepared.adjacency, model.item_tables)
    return graphdef, params, tx, tx.init(params)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_epoch_is_its_steps_one_after_the_other(prepared, optimizer):
    graphdef, params, tx, opt_state = start(prepared, optimizer)
    key = jax.random.key(4)

    shuffle_key, step_key = jax.random.split(key)
    packed = prepared.packed.shuffle(shuffle_key)
    expected, state, losses = params, opt_state, []
    for i in range(packed.num_batches):

        def loss_fn(p, i=i):
            rngs = jax.random.fold_in(step_key, i)
            return binary_cross_entropy(nnx.merge(graphdef, p), packed.batch(i), prepared.unseen, rngs)

        loss, grads = jax.value_and_grad(loss_fn)(expected)
        updates, state = tx.update(grads, state, expected)
        expected = optax.apply_updates(expected, updates)
        losses.append(float(loss))

    got, _, step_losses = jit(loop.make_epoch(graphdef, tx, binary_cross_entropy))(
        params, opt_state, prepared.packed, prepared.unseen, key
    )
    np.testing.assert_allclose(step_losses, losses, rtol=1e-4)
    # Adam divides by the gradient's size, so where a gradient nearly cancels, rounding decides its sign.
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (got, expected)]
    assert np.mean(np.abs(flat[0] - flat[1]) > 1e-4) < 1e-2


def test_the_seed_decides(prepared):
    first = loop.train(prepared, CONFIG, "sevo-adamw")
    again = loop.train(prepared, CONFIG, "sevo-adamw")
    other = loop.train(prepared, dataclasses.replace(CONFIG, seed=2), "sevo-adamw")
    assert first.losses == again.losses
    assert first.test == again.test
    assert first.losses != other.losses


def test_the_best_epoch_is_tested(prepared, tmp_path):
    result = loop.train(prepared, CONFIG, "sevo-gradient", tmp_path)
    history = read_history(tmp_path / "history.jsonl")
    assert [record["epoch"] for record in history] == [1, 2, 3, 4, 5, 6]
    assert [record["epoch"] for record in history if "validation" in record] == [2, 4, 6]
    assert [record["loss"] for record in history] == result.losses
    scores = {r["epoch"]: r["validation"]["NDCG@10"] for r in history if "validation" in r}
    assert result.best_epoch == max(scores, key=scores.__getitem__)
    assert result.validation["NDCG@10"] == scores[result.best_epoch]

    # Training again and stopping there ends with the parameters that were tested.
    graphdef, params, tx, opt_state = start(prepared, "sevo-gradient")
    epoch_fn = jit(loop.make_epoch(graphdef, tx, binary_cross_entropy))
    for epoch in range(1, result.best_epoch + 1):
        key = jax.random.fold_in(jax.random.key(CONFIG.seed), epoch)
        params, opt_state, _ = epoch_fn(params, opt_state, prepared.packed, prepared.unseen, key)
    ranks = jax.jit(lambda p: prepared.test.ranks(nnx.merge(graphdef, p)))(params)
    assert metrics.summarize(ranks) == pytest.approx(result.test, abs=1e-6)

    stored = json.loads((tmp_path / "result.json").read_text())
    assert stored == json.loads(json.dumps(dataclasses.asdict(result)))
    assert stored["config"]["learning_rate"] == 1e-2
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.partial"))


def test_the_last_epoch_is_evaluated_even_off_the_beat(prepared, tmp_path):
    loop.train(prepared, dataclasses.replace(CONFIG, epochs=3, eval_every=2), "adamw", tmp_path)
    history = read_history(tmp_path / "history.jsonl")
    assert [record["epoch"] for record in history if "validation" in record] == [2, 3]


def test_held_out_items_do_not_reach_the_graph():
    sequences = [[1, 2, 3, 4, 5], [2, 3, 6, 7], [1, 5, 2, 6, 3]]
    held_out_changed = [[1, 2, 3, 7, 6], [2, 3, 1, 4], [1, 5, 2, 4, 7]]
    first, second = (
        loop.prepare(Interactions.from_sequences(s, num_items=7), CONFIG).adjacency.todense()
        for s in (sequences, held_out_changed)
    )
    np.testing.assert_array_equal(first, second)
    assert first.shape == (8, 8)
    assert first[1, 2] == first[2, 1] == 1
    assert first[2, 3] == 2
    assert first[3, 4] == 0


def test_divergence_stops_and_says_where(prepared, tmp_path):
    wild = dataclasses.replace(CONFIG, learning_rate=1e38, weight_decay=10.0)
    with pytest.raises(
        loop.DivergedError, match=r"loss of epoch \d+, step \d+, is (nan|inf).*lower learning_rate=1e\+38"
    ):
        loop.train(prepared, wild, "adamw", tmp_path)
    assert (tmp_path / "history.jsonl").exists()
    assert not (tmp_path / "result.json").exists()


def test_every_optimizer_moves_the_table_differently(prepared):
    tables = {}
    for optimizer in OPTIMIZERS:
        graphdef, params, tx, opt_state = start(prepared, optimizer)
        params, _, _ = jit(loop.make_epoch(graphdef, tx, binary_cross_entropy))(
            params, opt_state, prepared.packed, prepared.unseen, jax.random.key(0)
        )
        tables[optimizer] = nnx.merge(graphdef, params).output_layer()[0]
    assert len({float(jnp.abs(table).sum()) for table in tables.values()}) == 3
    with pytest.raises(ValueError, match="optimizer must be one of adamw"):
        make_optimizer("sgd", CONFIG, prepared.adjacency, "item_embedding")


def test_compare(prepared, tmp_path):
    results = compare.compare(prepared, dataclasses.replace(CONFIG, epochs=2), tmp_path)
    assert [result.optimizer for result in results] == list(OPTIMIZERS)
    lines = compare.table(results).splitlines()
    assert lines[0].split()[:7] == ["optimizer", "HR@1", "HR@5", "HR@10", "NDCG@1", "NDCG@5", "NDCG@10"]
    assert [line.split()[0] for line in lines[1:]] == list(OPTIMIZERS)
    gain = results[2].test["NDCG@10"] / results[0].test["NDCG@10"] - 1
    assert f"{gain:+.1%}" in lines[3]
    assert (tmp_path / "compare.png").stat().st_size > 10_000
    assert len(json.loads((tmp_path / "compare.json").read_text())) == 3


def test_writing_fails_whole(tmp_path):
    write_json(tmp_path / "a.json", {"kept": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"not json": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"kept": 1}
