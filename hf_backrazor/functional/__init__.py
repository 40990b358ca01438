"""One autograd function for each operator: the forward of the dense operator, and what it saves for backward packed.

Knows nothing of modules or models. None of these functions can be differentiated twice.
"""

from .activation import ActivationRule, activation
from .attention import recomputed_attention, sparse_attention
from .batch_norm import batch_norm
from .convolution import Geometry, convolution
from .dropout import dropout
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .norm import layer_norm, rms_norm
from .pooling import Window, max_pool2d
from .product import product

__all__ = [
    "ActivationRule",
    "Geometry",
    "Window",
    "activation",
    "batch_norm",
    "convolution",
    "dropout",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "max_pool2d",
    "product",
    "recomputed_attention",
    "rms_norm",
    "sparse_attention",
]
