"""structmat: structured-matrix operators in one algebra.

Monarch, butterfly, Block Tensor-Train, low-rank and Kronecker matrices, held as small arrays and applied in far less
time and memory than dense ones; sums, products, inverses and Kronecker products of them stay structured wherever an
exact identity allows it; any dense matrix can be projected onto any family with a certificate.

Importing this package imports NumPy and nothing heavier; ``linalg``, ``testing``, ``plotting`` and projection are loaded
when they are first asked for.
"""

from typing import TYPE_CHECKING, Any

from structmat import arrays as arrays
from structmat import backends as backends
from structmat import blocks as blocks
from structmat import identities as identities
from structmat import patterns as patterns
from structmat import rules as rules
from structmat.algebra import kron as kron
from structmat.backends.selection import use_backend as use_backend
from structmat.blocks import block_diag as block_diag
from structmat.blocks import hstack as hstack
from structmat.blocks import vstack as vstack
from structmat.operator import Operator as Operator
from structmat.planning import tune as tune
from structmat.structures.block_diagonal import BlockDiagonal as BlockDiagonal
from structmat.structures.block_sparse import BlockSparse as BlockSparse
from structmat.structures.block_sparse import flat_block_butterfly as flat_block_butterfly
from structmat.structures.block_tensor_train import BlockTensorTrain as BlockTensorTrain
from structmat.structures.butterfly import Butterfly as Butterfly
from structmat.structures.chain import Chain as Chain
from structmat.structures.dense import Dense as Dense
from structmat.structures.diagonal import Diagonal as Diagonal
from structmat.structures.diagonal import Identity as Identity
from structmat.structures.diagonal import Zero as Zero
from structmat.structures.external import as_operator as as_operator
from structmat.structures.interpolative import Interpolative as Interpolative
from structmat.structures.interpolative_blocks import InterpolativeBlocks as InterpolativeBlocks
from structmat.structures.kronecker import Kronecker as Kronecker
from structmat.structures.low_rank import LowRank as LowRank
from structmat.structures.monarch import Monarch as Monarch
from structmat.structures.permutation import Permutation as Permutation
from structmat.structures.toeplitz import Circulant as Circulant
from structmat.structures.toeplitz import Toeplitz as Toeplitz
from structmat.structures.transforms import cosine as cosine
from structmat.structures.transforms import fourier as fourier
from structmat.structures.transforms import hadamard as hadamard

if TYPE_CHECKING:
    from structmat import linalg as linalg
    from structmat import plotting as plotting
    from structmat import testing as testing
    from structmat.projection.allocation import Allocation as Allocation
    from structmat.projection.allocation import allocate as allocate
    from structmat.projection.approximate import approximate as approximate
    from structmat.projection.approximations import Approximation as Approximation
    from structmat.projection.approximations import Approximations as Approximations
    from structmat.projection.blast import blast_patterns as blast_patterns
    from structmat.projection.certificate import Projection as Projection
    from structmat.projection.moments import Moments as Moments
    from structmat.projection.project import project as project
    from structmat.storage import load as load
    from structmat.storage import save as save

__version__ = "0.1.0"

_LATER = {
    "Allocation": "structmat.projection.allocation",
    "Approximation": "structmat.projection.approximations",
    "Approximations": "structmat.projection.approximations",
    "Moments": "structmat.projection.moments",
    "Projection": "structmat.projection.certificate",
    "allocate": "structmat.projection.allocation",
    "approximate": "structmat.projection.approximate",
    "blast_patterns": "structmat.projection.blast",
    "linalg": "structmat.linalg",
    "load": "structmat.storage",
    "plotting": "structmat.plotting",
    "project": "structmat.projection.project",
    "save": "structmat.storage",
    "testing": "structmat.testing",
}


@rules.fallback("compress")
def _compress(*arguments: Any) -> Any:
    """``A.compress``, loaded with the rest of projection; importing it takes this entry's place."""
    from structmat.projection.compress import compress

    return compress(*arguments)


@rules.fallback("plot")
def _plot(*arguments: Any) -> Any:
    """``Approximations.plot``, loaded with the rest of plotting; importing it takes this entry's place."""
    from structmat.plotting import plot_approximations

    return plot_approximations(*arguments)


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'structmat' has no attribute {name!r}")
    from importlib import import_module

    home = _LATER[name]
    module = import_module(home)
    value = module if home == f"structmat.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
