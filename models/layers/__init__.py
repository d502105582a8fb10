"""Building blocks that models share."""

from models.layers.additive import additive_attention as additive_attention
from models.layers.additive import additive_scores as additive_scores
from models.layers.attention import BLOCKED as BLOCKED
from models.layers.attention import Attention as Attention
from models.layers.attention import stacked_xavier_uniform as stacked_xavier_uniform
from models.layers.basic import Dropout as Dropout
from models.layers.basic import LayerNorm as LayerNorm
from models.layers.basic import Linear as Linear
from models.layers.basic import random_words as random_words
from models.layers.basic import split_keys as split_keys
from models.layers.basic import symmetric_uniform as symmetric_uniform
from models.layers.batch_norm import BatchNorm as BatchNorm
from models.layers.recurrent import GRU as GRU
