import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from models.architectures.registry import config_from_dict, make_config, make_model
from models.compilation import jit
from models.config import OPTIMIZERS
from models.data import Interactions, drifting_interests
from models.evaluation import metrics
from models.objectives.losses import Loss, binary_cross_entropy, make_loss
from models.objectives.objective import training_loss
from models.training import compare, loop
from models.training.files import read_history
from models.training.optimizers import make_schedule, make_stages
from models.training.program import make_epoch
from models.training.training_data import STEP_ONLY, NewestData, make_training_data
from sevo_optax import scale_by_adam_corrected, smooth, smoothness


def events(file):
    """The events of a TensorBoard file."""
    from tensorboardX.proto.event_pb2 import Event

    content, position = file.read_bytes(), 0
    while position < len(content):  # length, checksum, event, checksum
        length = int.from_bytes(content[position : position + 8], "little")
        yield Event.FromString(content[position + 12 : position + 12 + length])
        position += length + 16


CONFIG = make_config(
    max_length=8, embedding_dim=8, num_blocks=0, epochs=6, batch_size=20, eval_every=2, learning_rate=1e-2, seed=1
)
BCE = Loss(binary_cross_entropy, against_unseen=True)


@pytest.fixture(scope="module")
def prepared():
    return make_training_data(drifting_interests(num_users=60, num_items=40, num_groups=5, seed=3), CONFIG)


def start(prepared, optimizer, config=CONFIG):
    model = make_model(CONFIG, num_users=60, num_items=40, seed=1)
    graphdef, params = nnx.split(model, nnx.Param)
    tx = optax.named_chain(*make_stages(optimizer, config, prepared.nodes).items())
    return graphdef, params, tx, tx.init(params)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_epoch_is_its_steps_one_after_the_other(prepared, optimizer):
    graphdef, params, tx, opt_state = start(prepared, optimizer)
    key = jax.random.key(4)

    shuffle_key, step_key = jax.random.split(key)
    packed = prepared.feed.shuffle(shuffle_key)

    @jax.jit
    def step(params, state, i):
        def loss_fn(p):
            rngs = jax.random.fold_in(step_key, i)
            return training_loss(nnx.merge(graphdef, p), BCE, packed.batch(i), {}, prepared.sampler, rngs)

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    expected, state, losses = params, opt_state, []
    for i in range(packed.num_batches):
        expected, state, loss = step(expected, state, i)
        losses.append(float(loss))

    got, _, step_losses = jit(make_epoch(graphdef, tx, BCE))(
        params, opt_state, prepared.feed, prepared.sampler, {}, key
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
    config = dataclasses.replace(CONFIG, learning_rate=0.2)
    result = loop.train(prepared, config, "sevo-gradient", tmp_path)
    history = read_history(tmp_path / "history.jsonl")
    assert [record["epoch"] for record in history] == [1, 2, 3, 4, 5, 6]
    assert [record["epoch"] for record in history if "validation" in record] == [2, 4, 6]
    assert [record["loss"] for record in history] == result.losses
    scores = {r["epoch"]: r["validation"]["NDCG@10"] for r in history if "validation" in r}
    assert result.best_epoch == max(scores, key=scores.__getitem__)
    assert result.best_epoch < config.epochs  # or testing the last one would be the same
    assert result.validation["NDCG@10"] == scores[result.best_epoch]

    # Training again and stopping there ends with the parameters that were tested.
    graphdef, params, tx, opt_state = start(prepared, "sevo-gradient", config)
    epoch_fn = jit(make_epoch(graphdef, tx, BCE))
    for epoch in range(1, result.best_epoch + 1):
        key = jax.random.fold_in(jax.random.key(config.seed), epoch)
        params, opt_state, _ = epoch_fn(params, opt_state, prepared.feed, prepared.sampler, {}, key)
    ranks = jax.jit(lambda p: prepared.test.ranks(nnx.merge(graphdef, p), {}))(params)
    assert result.test == pytest.approx(result.test | metrics.summarize(ranks), abs=1e-6)

    stored = json.loads((tmp_path / "result.json").read_text())
    assert stored == json.loads(json.dumps(dataclasses.asdict(result)))
    assert stored["config"]["learning_rate"] == 0.2
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".partial-*"))


def test_the_last_epoch_is_evaluated_even_off_the_beat(prepared, tmp_path):
    loop.train(prepared, dataclasses.replace(CONFIG, epochs=3, eval_every=2), "adamw", tmp_path)
    history = read_history(tmp_path / "history.jsonl")
    assert [record["epoch"] for record in history if "validation" in record] == [2, 3]


def test_held_out_items_do_not_reach_the_graph():
    sequences = [[1, 2, 3, 4, 5], [2, 3, 6, 7], [1, 5, 2, 6, 3]]
    held_out_changed = [[1, 2, 3, 7, 6], [2, 3, 1, 4], [1, 5, 2, 4, 7]]
    first, second = (
        make_training_data(Interactions.from_sequences(s, num_items=7), CONFIG).nodes.adjacency.todense()
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
        params, _, _ = jit(make_epoch(graphdef, tx, BCE))(
            params, opt_state, prepared.feed, prepared.sampler, {}, jax.random.key(0)
        )
        tables[optimizer] = nnx.merge(graphdef, params).items()[0]
    assert len({float(jnp.abs(table).sum()) for table in tables.values()}) == 3
    with pytest.raises(ValueError, match="optimizer must be one of adamw"):
        make_stages("lion", CONFIG, prepared.nodes)


def test_compare(prepared, tmp_path):
    results = compare.compare(prepared, dataclasses.replace(CONFIG, epochs=2), tmp_path)
    assert list(results) == list(OPTIMIZERS)
    lines = compare.table(results).splitlines()
    assert lines[0].split()[:7] == ["optimizer", "HR@1", "HR@5", "HR@10", "NDCG@1", "NDCG@5", "NDCG@10"]
    assert [line.split()[0] for line in lines[1:]] == list(OPTIMIZERS)
    gain = results["sevo-gradient"][0].test["NDCG@10"] / results["adamw"][0].test["NDCG@10"] - 1
    assert f"{gain:+.1%}" in lines[3]
    assert "±" not in lines[1]
    other = {
        name: [dataclasses.replace(run, test={"HR@5": 0.5, "NDCG@5": run.test["NDCG@5"]}) for run in runs]
        for name, runs in results.items()
    }
    assert compare.table(other).splitlines()[0].split()[:6] == ["optimizer", "HR@5", "NDCG@5", "gain", "in", "NDCG@5"]
    assert (tmp_path / "compare.png").stat().st_size > 10_000
    report = json.loads((tmp_path / "compare.json").read_text())
    assert report["optimizers"]["sevo-gradient"]["test"]["NDCG@10"] == {
        "mean": results["sevo-gradient"][0].test["NDCG@10"],
        "sd": None,
        "relative": pytest.approx(gain),
        "p_value": None,
    }


def test_compare_several_seeds(prepared, tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, epochs=2, seed=5)
    options = {"optimizers": ("adamw", "sevo-gradient"), "seeds": 2}
    results = compare.compare(prepared, config, tmp_path / "alone", **options)
    assert [run.config["seed"] for run in results["adamw"]] == [5, 6]
    assert (tmp_path / "alone" / "sevo-gradient-6" / "run.json").exists()

    values, base = ([run.test["NDCG@10"] for run in results[name]] for name in ("sevo-gradient", "adamw"))
    found = json.loads((tmp_path / "alone" / "compare.json").read_text())["optimizers"]["sevo-gradient"]["test"]
    differences = np.subtract(values, base)
    t = differences.mean() / (differences.std(ddof=1) / np.sqrt(2))
    # The distribution function of Student's t with one degree of freedom, in closed form.
    p = 1 - 2 * np.arctan(abs(t)) / np.pi
    assert found["NDCG@10"]["p_value"] == pytest.approx(p, rel=1e-6)
    assert found["NDCG@10"]["mean"] == pytest.approx(np.mean(values))
    assert found["NDCG@10"]["sd"] == pytest.approx(np.std(values, ddof=1))
    line = compare.table(results).splitlines()[2]
    assert f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}" in line
    assert f"{p:.2g}" in line.split()

    with monkeypatch.context() as patch:  # as on a GPU
        patch.setattr(compare, "seeds_at_once", lambda count: count)
        together = compare.compare(prepared, config, tmp_path / "together", optimizers=("sevo-gradient",), seeds=2)
    assert [run.seeds_together for run in together["sevo-gradient"]] == [2, 2]
    for one, two in zip(results["sevo-gradient"], together["sevo-gradient"], strict=True):
        np.testing.assert_allclose(two.losses, one.losses, rtol=1e-3)

    again = compare.compare(prepared, config, tmp_path / "alone", **options, resume=True)
    assert again == results


def test_no_t_test_without_differences():
    assert compare.gain([0.5], [0.4]) == compare.Gain(pytest.approx(0.25), None)
    assert compare.gain([0.5, 0.5], [0.4, 0.4]).p_value is None
    assert compare.gain([0.5, 0.4], [0.0, 0.0]).relative is None


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules(schedule):
    config = dataclasses.replace(CONFIG, schedule=schedule, warmup_epochs=2, epochs=10, learning_rate=0.5)
    rate = make_schedule(config, steps_per_epoch=4)
    steps = np.arange(41)
    rest = np.clip((steps - 8) / 32, 0, 1)
    falling = {"constant": 1 + 0 * rest, "linear": 1 - rest, "cosine": (1 + np.cos(np.pi * rest)) / 2}
    expected = 0.5 * np.where(steps < 8, steps / 8, falling[schedule])
    np.testing.assert_allclose([rate(step) for step in steps], expected, atol=1e-6)


def test_a_schedule_reaches_the_steps(prepared):
    falling = loop.train(prepared, dataclasses.replace(CONFIG, schedule="linear", warmup_epochs=1), "sevo-adamw")
    constant = loop.train(prepared, CONFIG, "sevo-adamw")
    assert falling.losses[0] > constant.losses[0]  # the first steps of a warm-up are small
    assert falling.losses != constant.losses


def test_clipped_gradients_have_the_norm(prepared):
    config = dataclasses.replace(CONFIG, clip_norm=1e-3)
    stages = make_stages("sevo-gradient", config, prepared.nodes, clip_norm=config.clip_norm)
    assert next(iter(stages)) == "clip"
    grads = {"item_embedding": jnp.ones((41, 8))}
    clipped, _ = stages["clip"].update(grads, stages["clip"].init(grads))
    assert float(optax.tree.norm(clipped)) == pytest.approx(1e-3)
    assert "clip" not in make_stages("adamw", CONFIG, prepared.nodes)


@pytest.mark.parametrize("model", ["sasrec", "stosa"])
def test_windows_train_on_whole_histories(model, tmp_path):
    """Each item but the first is a target once an epoch; without windows, the newest alone."""
    data = drifting_interests(num_users=20, num_items=40, num_groups=5, seed=3)
    config = make_config(model, max_length=3, embedding_dim=8, epochs=2, batch_size=8, windows=True)
    cut, whole = (make_training_data(data, dataclasses.replace(config, windows=x)) for x in (False, True))

    def num_targets(prepared):
        batches = [prepared.feed.batch(i) for i in range(prepared.feed.num_batches)]
        return sum(int((batch.targets * (batch.segments > 0) > 0).sum()) for batch in batches)

    lengths = whole.split.train.lengths
    assert lengths.max() > 6
    assert num_targets(whole) == (lengths - 1).sum() > num_targets(cut) == np.minimum(lengths - 1, 3).sum()
    assert whole.feed.num_batches > cut.feed.num_batches  # batch_size counts windows
    result = loop.train(whole, config, "sevo-gradient", tmp_path)
    assert np.isfinite(result.losses).all()


def test_early_stopping(prepared, tmp_path, capsys):
    config = dataclasses.replace(CONFIG, epochs=200, patience=3)
    result = loop.train(prepared, config, "adamw", tmp_path)
    scores = [record["validation"]["NDCG@10"] for record in read_history(tmp_path / "history.jsonl")[1::2]]
    assert len(result.losses) == 2 * len(scores) < 200
    assert result.best_epoch == len(result.losses) - 2 * 3
    assert max(scores[-3:]) <= scores[-4] == max(scores)
    assert "in 3 evaluations: stopped early" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["sasrec", "bert4rec"])
@pytest.mark.parametrize("loss", ["bce", "ce"])
def test_bfloat16_computes_close_to_float32(prepared, model, loss):
    config = config_from_dict(
        CONFIG.differing() | {"model": model, "loss": loss, "dropout_rate": 0.0, "num_heads": 2, "num_blocks": 1}
    )
    kind = dataclasses.replace(config, compute_dtype="bfloat16")
    losses = {}
    for name, settings in (("float32", config), ("bfloat16", kind)):
        model_ = make_model(settings, num_users=60, num_items=40, seed=1)
        graphdef, params = nnx.split(model_, nnx.Param)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
        function = make_loss(settings)

        def value(params, graphdef=graphdef, function=function):
            model = nnx.merge(graphdef, params)
            return training_loss(model, function, prepared.feed.batch(0), {}, prepared.sampler, jax.random.key(0))

        losses[name], grads = jax.jit(jax.value_and_grad(value))(params)
        assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
        hidden = jax.eval_shape(lambda m: m(prepared.feed.batch(0)), model_)
        assert hidden.dtype == name
    assert losses["bfloat16"].dtype == jnp.float32
    assert float(losses["bfloat16"]) != float(losses["float32"])
    assert float(losses["bfloat16"]) == pytest.approx(float(losses["float32"]), rel=1e-2)


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "sgd"])
def test_diagnostics_describe_the_next_step_and_change_nothing(prepared, tmp_path, optimizer):
    config = dataclasses.replace(CONFIG, epochs=2)
    result = loop.train(prepared, dataclasses.replace(config, diagnostics=True), optimizer, tmp_path)
    found = read_history(tmp_path / "history.jsonl")[1]["diagnostics"]

    graphdef, params, tx, opt_state = start(prepared, optimizer)
    epoch = jit(make_epoch(graphdef, tx, BCE))
    for number in (1, 2):
        key = jax.random.fold_in(jax.random.key(CONFIG.seed), number)
        params, opt_state, losses = epoch(params, opt_state, prepared.feed, prepared.sampler, {}, key)
        assert result.losses[number - 1] == float(np.asarray(losses).mean())
    shuffle_key, step_key = jax.random.split(key)
    batch = prepared.feed.shuffle(shuffle_key).batch(0)
    grads = jax.grad(lambda p: training_loss(nnx.merge(graphdef, p), BCE, batch, {}, prepared.sampler, step_key))(
        params
    )
    raw = grads
    if optimizer == "adamw":
        raw, _ = optax.scale_by_adam(b2=0.98).update(grads, opt_state["moments"])
    if optimizer == "sevo-adamw":
        raw, _ = scale_by_adam_corrected(b2=0.98, tables="item_embedding").update(grads, opt_state["moments"])
    if optimizer == "sgd":
        decayed = jax.tree.map(lambda g, p: g + CONFIG.weight_decay * p, grads, params)
        raw, _ = optax.trace(CONFIG.b1).update(decayed, opt_state["moments"])
    (raw,) = jax.tree.leaves(raw["item_embedding"])
    plain = not optimizer.startswith("sevo-")
    smoothed = raw if plain else smooth(raw, prepared.nodes.adjacency)
    (table,) = jax.tree.leaves(params["item_embedding"])

    def energy(x):
        return float(smoothness(x, prepared.nodes.adjacency))

    def rough(x):
        return energy(x) / float(jnp.sum(x * x))

    cosine = float(jnp.sum(raw * smoothed) / jnp.linalg.norm(raw) / jnp.linalg.norm(smoothed))
    expected = {}
    for name, x in [("raw update", raw), ("smoothed update", smoothed), ("embedding", table)]:
        expected |= {name: rough(x), f"{name} energy": energy(x)}
    expected = {f"item_embedding/{name}": value for name, value in (expected | {"alignment": cosine}).items()}
    assert found == pytest.approx(expected, rel=1e-3)
    if not plain:
        assert found["item_embedding/smoothed update"] < found["item_embedding/raw update"]
        assert 0 < found["item_embedding/alignment"] < 1


def test_scalars_for_tensorboard(prepared, tmp_path):
    config = dataclasses.replace(CONFIG, epochs=2, logger=("tensorboard",), diagnostics=True)
    result = loop.train(prepared, config, "sevo-adamw", tmp_path)
    (file,) = (tmp_path / "tensorboard").iterdir()
    found = {}
    for event in events(file):
        for value in event.summary.value:
            found.setdefault(value.tag, {})[event.step] = value.simple_value
    assert found["loss"] == pytest.approx(dict(enumerate(result.losses, 1)))
    assert found["validation/NDCG_10"] == pytest.approx({2: result.validation["NDCG@10"]})
    assert {"tokens_per_second", "item_embedding/alignment", "item_embedding/raw_update"} <= set(found)


def test_ranks_of_users(prepared, tmp_path):
    result = loop.train(prepared, dataclasses.replace(CONFIG, epochs=2, per_user=True, ks=(3, 7)), "adamw", tmp_path)
    lines = (tmp_path / "per_user.csv").read_text().splitlines()
    assert lines[0] == "user,item,rank"
    rows = np.array([line.split(",") for line in lines[1:]], int)
    np.testing.assert_array_equal(rows[:, 0], prepared.split.test_history.user_ids)
    np.testing.assert_array_equal(rows[:, 1], prepared.split.test)
    assert result.test["HR@7"] == pytest.approx(np.mean(rows[:, 2] <= 7))
    assert result.test["MRR@3"] == pytest.approx(np.mean(np.where(rows[:, 2] <= 3, 1 / rows[:, 2], 0)))
    assert set(result.test) == {f"{name}@{k}" for name in ("HR", "NDCG", "MRR", "coverage") for k in (3, 7)}


def test_seen_items_are_ranked_on_request(prepared):
    config = dataclasses.replace(CONFIG, epochs=2, exclude_seen=False, ks=(40,))
    everything = loop.train(make_training_data(prepared.interactions, config), config, "adamw")
    unseen = loop.train(prepared, dataclasses.replace(config, exclude_seen=True), "adamw")
    assert everything.losses == unseen.losses
    assert everything.test["MRR@40"] < unseen.test["MRR@40"]
    assert everything.protocol != unseen.protocol


def test_runs_that_differ_in_their_steps_alone_share_their_data(prepared):
    read = []
    data = NewestData(lambda config: read.append(config) or prepared.interactions)
    first = data.prepared(CONFIG)
    others = {"seed": 5, "optimizer": "sgd", "learning_rate": 0.5, "weight_decay": 0.3, "b1": 0.1, "b2": 0.2}
    others |= {"moment_correction": False, "schedule": "cosine", "warmup_epochs": 1, "clip_norm": 1.0, "beta": 0.1}
    others |= {"num_layers": 1, "rescale": False, "smoothing": "iterative", "dropout_rate": 0.0}
    assert others.keys() == {*STEP_ONLY}
    for name, value in others.items():
        assert getattr(CONFIG, name) != value
        assert data.prepared(dataclasses.replace(CONFIG, **{name: value})) is first
    assert len(read) == 1
    same = make_training_data(prepared.interactions, dataclasses.replace(CONFIG, **others))
    for one, other in zip(
        jax.tree.leaves((first.feed, first.nodes.adjacency, first.test)),
        jax.tree.leaves((same.feed, same.nodes.adjacency, same.test)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    for name, value in {"max_length": 3, "max_hops": 2, "batch_size": 7, "exclude_seen": False}.items():
        assert data.prepared(dataclasses.replace(CONFIG, **{name: value})) is not first
        first = data.prepared(CONFIG)
