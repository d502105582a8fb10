"""What a training step is fed: packed sequences, prefixes, or user-item pairs."""

from models.feeds.negatives import NegativeSampler as NegativeSampler
from models.feeds.packed import Batch as Batch
from models.feeds.packed import PackedSequences as PackedSequences
from models.feeds.packed import pack as pack
from models.feeds.pairs import PairBatch as PairBatch
from models.feeds.pairs import Pairs as Pairs
from models.feeds.prefixes import Prefixes as Prefixes
