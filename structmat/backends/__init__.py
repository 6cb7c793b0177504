"""Backends: how operators are applied to the arrays of each library."""

from structmat.backends.base import Backend as Backend
from structmat.backends.cuda.precision import use_precision as use_precision
from structmat.backends.selection import available as available
from structmat.backends.selection import register as register
from structmat.backends.selection import use_backend as use_backend
