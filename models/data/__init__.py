"""Interactions: where they come from, how they are split, and how they are packed for training."""

from models.data.attributes import read_attributes as read_attributes
from models.data.interactions import Interactions as Interactions
from models.data.interactions import LeaveOneOut as LeaveOneOut
from models.data.interactions import leave_one_out as leave_one_out
from models.data.negatives import UnseenItems as UnseenItems
from models.data.packing import Batch as Batch
from models.data.packing import PackedSequences as PackedSequences
from models.data.packing import pack as pack
from models.data.readers import load as load
from models.data.readers import read_sequences as read_sequences
from models.data.synthetic import drifting_interests as drifting_interests
