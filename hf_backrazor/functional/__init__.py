"""One autograd function for each operator: the forward of the dense operator, and what it saves for backward packed.

Knows nothing of modules or models. None of these functions can be differentiated twice.
"""

from .activation import ActivationRule, activation
from .attention import recomputed_attention, sparse_attention
from .batch_norm import batch_norm
from .convolution import Geometry, convolution, convolution_same
from .dropout import dropout
from .group_norm import group_norm
from .interpolated_cross_entropy import Resizing, interpolated_cross_entropy
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .linear_gather import linear_gather
from .norm import layer_norm, rms_norm
from .padding import zero_pad
from .pooling import Averaging, Window, adaptive_average_pool2d, average_pool2d, max_pool2d
from .product import product
from .scaling import scaling

__all__ = [
    "ActivationRule",
    "Averaging",
    "Geometry",
    "Resizing",
    "Window",
    "activation",
    "adaptive_average_pool2d",
    "average_pool2d",
    "batch_norm",
    "convolution",
    "convolution_same",
    "dropout",
    "group_norm",
    "interpolated_cross_entropy",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_gather",
    "max_pool2d",
    "product",
    "recomputed_attention",
    "rms_norm",
    "scaling",
    "sparse_attention",
    "zero_pad",
]
