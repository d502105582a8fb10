"""Interactions: where they come from, how they are filtered, and how they are split."""

from models.data.attributes import item_attributes as item_attributes
from models.data.attributes import read_attributes as read_attributes
from models.data.attributes import read_titles as read_titles
from models.data.filters import drop_duplicates as drop_duplicates
from models.data.filters import k_core as k_core
from models.data.ids import id_lookup as id_lookup
from models.data.ids import ids_from_arrays as ids_from_arrays
from models.data.ids import ids_to_arrays as ids_to_arrays
from models.data.ids import ids_usage as ids_usage
from models.data.ids import item_lookup as item_lookup
from models.data.ids import item_numbers as item_numbers
from models.data.interactions import Interactions as Interactions
from models.data.named import NAMED as NAMED
from models.data.named import fetch_named as fetch_named
from models.data.readers import load as load
from models.data.readers import read_sequences as read_sequences
from models.data.source import load_interactions as load_interactions
from models.data.source import split_interactions as split_interactions
from models.data.splits import Split as Split
from models.data.splits import cold_start as cold_start
from models.data.splits import global_time as global_time
from models.data.splits import leave_one_out as leave_one_out
from models.data.splits import make_split as make_split
from models.data.synthetic import drifting_interests as drifting_interests
from models.data.vectors import read_item_vectors as read_item_vectors
from models.data.vectors import write_item_vectors as write_item_vectors
