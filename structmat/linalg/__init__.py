"""Linear algebra of operators: ``numpy.linalg``'s functions, by closed forms of the stored blocks.

Every function asks the rule table (``structmat/rules.py``) under its own name; each file holds what the library knows about
its quantities. What has no rule is computed exactly from unit columns where that needs no more than ``n`` applications,
and raises ``NotImplementedError`` otherwise: nothing is silently densified, and no function assumes symmetry.
"""

from structmat.linalg.determinant import SlogdetResult as SlogdetResult
from structmat.linalg.determinant import det as det
from structmat.linalg.determinant import slogdet as slogdet
from structmat.linalg.diagonal import diagonal as diagonal
from structmat.linalg.diagonal import trace as trace
from structmat.linalg.eigen import EighResult as EighResult
from structmat.linalg.eigen import eigh as eigh
from structmat.linalg.eigen import eigvals as eigvals
from structmat.linalg.eigen import eigvalsh as eigvalsh
from structmat.linalg.functions import cholesky as cholesky
from structmat.linalg.functions import expm as expm
from structmat.linalg.least_squares import LstsqResult as LstsqResult
from structmat.linalg.least_squares import lstsq as lstsq
from structmat.linalg.least_squares import pinv as pinv
from structmat.linalg.norms import norm as norm
from structmat.linalg.singular import cond as cond
from structmat.linalg.singular import matrix_rank as matrix_rank
from structmat.linalg.singular import svdvals as svdvals
from structmat.linalg.solve import inv as inv
from structmat.linalg.solve import solve as solve
