"""The torch backend: chains and Kronecker products on torch tensors, differentiable in the operator and the operand.

torch is imported when the first plan is made.
"""

from structmat.backends.torch.backend import TorchBackend as TorchBackend
from structmat.backends.torch.backend import TorchOperatorBackend as TorchOperatorBackend
