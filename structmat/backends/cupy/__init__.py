"""The CuPy backend: operators on a GPU. Importing it imports no CuPy; that happens when the first CuPy array is applied."""

from structmat.backends.cupy.backend import CupyBackend as CupyBackend
