"""Import this before transformers: a torchvision built for CUDA can then be imported beside a CPU torch.

Set TORCHVISION_FOLDER to where `pip install --no-deps --target FOLDER torchvision==0.28.0` put it. Its own
kernels are declared and never called: benchmarks' peers need its transforms only, and we need none of it.
"""

from __future__ import annotations

import os
import sys

import torch

_KERNELS = ("roi_align", "_roi_align_backward", "ps_roi_align", "_ps_roi_align_backward", "roi_pool",
            "_roi_pool_backward", "ps_roi_pool", "_ps_roi_pool_backward", "deform_conv2d",
            "_deform_conv2d_backward", "nms", "qnms", "qroi_align")  # fmt: skip

if "TORCHVISION_FOLDER" in os.environ:
    sys.path.append(os.environ["TORCHVISION_FOLDER"])
    LIBRARY = torch.library.Library("torchvision", "DEF")
    """The declarations live as long as this does."""
    for _name in _KERNELS:
        LIBRARY.define(f"{_name}(Tensor a) -> Tensor")
