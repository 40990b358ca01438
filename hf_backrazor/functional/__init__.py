"""One autograd function for each operator: the forward of the dense operator, and what it saves for backward packed.

Knows nothing of modules or models. None of these functions can be differentiated twice.
"""

from .activation import ActivationRule, activation
from .attention import recomputed_attention, sparse_attention
from .dropout import dropout
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .norm import layer_norm, rms_norm
from .product import product

__all__ = [
    "ActivationRule",
    "activation",
    "dropout",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "product",
    "recomputed_attention",
    "rms_norm",
    "sparse_attention",
]
