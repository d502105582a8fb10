"""Models by name."""

from flax import nnx

from models.bert4rec import BERT4Rec
from models.sasrec import SASRec
from models.sequence_model import SequenceModel
from models.training.config import Model, ModelConfig

MODELS: dict[Model, type[SequenceModel]] = {"sasrec": SASRec, "bert4rec": BERT4Rec}
OPTIONS: dict[Model, tuple[str, ...]] = {
    "sasrec": ("attend_padding",),
    "bert4rec": ("mask_probability", "mask_last_probability", "tie_output"),
}


def make_model(config: ModelConfig, *, num_items: int, max_length: int, seed: int) -> SequenceModel:
    """Builds a freshly initialised model from a resolved configuration."""
    return MODELS[config.model](
        num_items,
        max_length=max_length,
        embedding_dim=config.embedding_dim,
        num_blocks=config.num_blocks,
        num_heads=config.num_heads,
        dropout_rate=config.dropout_rate,
        dtype=config.compute_dtype,
        **{name: getattr(config, name) for name in OPTIONS[config.model]},
        rngs=nnx.Rngs(seed),
    )
