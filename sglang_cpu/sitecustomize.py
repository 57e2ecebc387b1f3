"""For the site-packages of the CPU server environment: lets torchvision be imported beside a CPU
build of torch.

PyPI's torchvision is compiled for CUDA, so its operators do not load, and its import then fails
while it registers shape functions for two of them. Declaring the two before torchvision is imported
is enough; nothing calls them.
"""

import sys


class _DeclareOperators:
    """A finder that finds nothing; it declares operators when torchvision is first looked for."""

    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and _DeclareOperators.library is None:
            import torch

            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
            _DeclareOperators.library = library
        return None


sys.meta_path.insert(0, _DeclareOperators())
