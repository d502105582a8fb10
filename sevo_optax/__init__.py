"""Structure-aware embedding evolution (SEvo) for optax: related embeddings move together.

>>> import optax
>>> from sevo_optax import adamw_corrected, graph, sevo
>>> weights = graph.cooccurrence([[1, 2, 3], [2, 3]], num_nodes=4)
>>> tx = optax.chain(sevo(weights, "item_embedding"), adamw_corrected(1e-3, tables="item_embedding"))
"""

from sevo_optax import graph as graph
from sevo_optax._adam import ScaleByAdamCorrectedState as ScaleByAdamCorrectedState
from sevo_optax._adam import scale_by_adam_corrected as scale_by_adam_corrected
from sevo_optax._alias import adamw_corrected as adamw_corrected
from sevo_optax._alias import sevo_adam as sevo_adam
from sevo_optax._alias import sevo_adamw as sevo_adamw
from sevo_optax._alias import sevo_sgd as sevo_sgd
from sevo_optax._diagnostics import alignment as alignment
from sevo_optax._diagnostics import smoothness as smoothness
from sevo_optax._sevo import SEvoState as SEvoState
from sevo_optax._sevo import sevo as sevo
from sevo_optax._sevo import state_axes as state_axes
from sevo_optax._sevo import with_graphs as with_graphs
from sevo_optax._sevo import without_graphs as without_graphs
from sevo_optax._smooth import propagate as propagate
from sevo_optax._smooth import residual as residual
from sevo_optax._smooth import smooth as smooth

__all__ = [
    "SEvoState",
    "ScaleByAdamCorrectedState",
    "adamw_corrected",
    "alignment",
    "graph",
    "propagate",
    "residual",
    "scale_by_adam_corrected",
    "sevo",
    "sevo_adam",
    "sevo_adamw",
    "sevo_sgd",
    "smooth",
    "smoothness",
    "state_axes",
    "with_graphs",
    "without_graphs",
]

__version__ = "0.1.0"


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
