import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import memory
from models.__main__ import main
from models.architectures.registry import MODELS, make_config, make_model, model_class
from models.data import Interactions
from models.memory import COPIES, Need, OutOfMemoryError, check_memory, out_of_memory_told, training_needs
from models.training import loop
from sevo_optax import _memory

DATA = Interactions.from_sequences([[1, 2, 3, 4], [3, 4, 5]])


@pytest.mark.parametrize("model", ["sasrec", "bert4rec"])
@pytest.mark.parametrize("sizes", [{}, {"embedding_dim": 256}, {"max_length": 3000}, {"num_blocks": 9}])
def test_the_estimate_covers_the_parameters_and_not_much_more(model, sizes):
    config = make_config(model, **sizes)
    built = nnx.eval_shape(lambda: make_model(config, num_users=0, num_items=5, seed=0))
    real = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(built, nnx.Param)))
    estimated = sum(need.size for need in training_needs(config, DATA)[:3]) / (4 * COPIES)
    assert 0.8 * real < estimated < 2.5 * real


@pytest.mark.parametrize("model", MODELS)
def test_every_table_of_items_counts(model):
    config = make_config(model)
    built = nnx.eval_shape(lambda: make_model(config, num_users=7, num_items=5000, seed=0))
    shapes = [leaf.shape for leaf in jax.tree.leaves(nnx.state(built, nnx.Param))]
    assert sum(len(shape) == 2 and shape[0] >= 5000 for shape in shapes) == model_class(model).item_tables


@pytest.mark.parametrize(
    ("model", "message"), [("popularity", "embedded: training .*; take fewer"), ("item-knn", "lower --num-neighbors")]
)
def test_closed_forms_have_no_embeddings(model, message):
    many = Interactions.from_sequences([[1, 2, 3]], 10**6)
    needs = training_needs(make_config(model, **({"num_neighbors": 10**5} if model == "item-knn" else {})), many)
    assert not any("embeddings" in need.what for need in needs)
    with pytest.raises(OutOfMemoryError, match=message):
        check_memory(needs, make_config(model), room=2**20)


@pytest.mark.parametrize(
    ("fields", "option"),
    [
        ({"embedding_dim": 10**8}, "embedding_dim"),
        ({"max_length": 10**9}, "max_length"),
        ({"num_blocks": 10**9}, "num_blocks"),
        ({"loss": "gbce", "negatives": "per-position", "num_negatives": 10**9}, "num_negatives"),
        ({"loss": "sampled-softmax", "num_negatives": 10**9}, "num_negatives"),
        ({"model": "gru4rec", "hidden_dim": 10**6}, "hidden_dim"),
        ({"model": "gru4rec", "num_gru_layers": 10**9}, "num_gru_layers"),
    ],
)
def test_the_option_that_lowers_it_is_named(fields, option):
    config = make_config(**fields)
    with pytest.raises(OutOfMemoryError) as caught:
        check_memory(training_needs(config, DATA), config)
    message = str(caught.value)
    assert message.startswith(f"{option} {fields[option]}: training needs about ")
    assert message.endswith(f"lower --{option.replace('_', '-')}")


def test_prefixes_take_a_token_each_or_a_row():
    for separate, tokens in [(False, 7), (True, 7 * 4)]:
        needs = training_needs(make_config("gru4rec", separate_prefixes=separate), DATA)
        assert any(need.what.startswith(f"the states of {tokens} tokens") for need in needs)


def test_windows_are_more_than_users():
    longer = Interactions.from_sequences([list(range(1, 301))] * 3)
    for windows, tokens in [(False, 3 * 10), (True, 64 * 10)]:
        needs = training_needs(make_config(max_length=10, batch_size=64, windows=windows), longer)
        assert any(need.what.startswith(f"the layers of {tokens} tokens") for need in needs)


@pytest.mark.parametrize("model", ["mf-bpr", "lightgcn"])
def test_pairs_take_one_place_each_and_users_a_table(model):
    """Histories are longer than a batch has pairs, and neither model has a length of histories to lower."""
    longer = Interactions.from_sequences([list(range(1, 3001))] * 3)
    config = make_config(model, batch_size=2000, embedding_dim=1024)
    needs = training_needs(config, longer)
    assert any(need.what.startswith("the layers of 2,000 tokens") for need in needs)
    (stored,) = [need for need in needs if need.what.startswith("9,000 interactions")]
    assert (stored.size, stored.option) == (56 * 9000, "data")
    (users,) = [need for need in needs if need.what.startswith("the embeddings of 3 users")]
    assert users.size == 4 * COPIES * 3 * 1024
    with pytest.raises(OutOfMemoryError, match=r"lower --(embedding-dim|batch-size)$"):
        check_memory(needs, config, room=1000)


def test_the_sum_counts():
    needs = [Need("one", 600, "batch_size"), Need("another", 500, "ks")]
    check_memory(needs, make_config(), room=1100)
    with pytest.raises(OutOfMemoryError, match=r"needs about 1\.1 KiB .* are for one; lower --batch-size"):
        check_memory(needs, make_config(batch_size=7), room=1099)


def test_published_runs_fit():
    long = Interactions.from_sequences([list(range(1, 3417))] * 3)
    for model in ["sasrec", "bert4rec"]:
        config = make_config(model, max_length=200)
        check_memory(training_needs(config, long), config, room=2 * 2**30)


def test_a_container_lowers_what_there_is(tmp_path, monkeypatch):
    whole = memory.memory_size()
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "low").write_text("12345\n")
    monkeypatch.setattr(_memory, "control_groups", lambda: [(tmp_path / name, None) for name in ("none", "max")])
    assert memory.memory_size() >= whole
    monkeypatch.setattr(_memory, "control_groups", lambda: [(tmp_path / name, None) for name in ("low", "max")])
    assert memory.memory_size() == 12345


@pytest.mark.parametrize(
    ("exhaust", "asked"),
    [
        (lambda: jnp.zeros(10**13).block_until_ready(), "36.4 TiB"),
        (lambda: np.zeros(10**15), "7.1 PiB"),
        (lambda: bytearray(10**15), None),
    ],
)
def test_running_out_is_one_line(exhaust, asked):
    with pytest.raises(OutOfMemoryError) as caught, out_of_memory_told():
        exhaust()
    assert "lower --batch-size" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert asked is None or f"out of memory, {asked} more were needed" in str(caught.value)


def test_what_does_not_train_has_no_options_of_training():
    with pytest.raises(OutOfMemoryError, match=r"in all\); end other programs"), out_of_memory_told(trains=False):
        raise MemoryError


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match=r"^something else$"), out_of_memory_told():
        raise RuntimeError("something else")


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    command = ["train", "--output-dir", str(tmp_path)]
    assert main([*command, "--max-length", "1000000000"]) == 2
    assert capsys.readouterr().err.startswith("error: max_length 1000000000: training needs about 1.4 TiB of memory")

    def exhausted(*_, **__):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 2147483648 bytes.\n\nBufferAssignment …"
        )

    monkeypatch.setattr(loop, "train", exhausted)
    assert main(command) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: out of memory, 2.0 GiB more were needed (there are ")
    assert err.count("\n") == 1
