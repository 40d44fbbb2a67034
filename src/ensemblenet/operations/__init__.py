"""All that is known of an operation, in one class: how its sizes couple, how it is narrowed, initialised and fused.

Each family of operations has a file. A layer type of your own takes one class:

```python
from ensemblenet.operations import Operation, register

@register(MyLayer)
class MyLayerOperation(Operation):
    def narrow(self, layer, base, sizes):
        layer.width = sizes.output[1]
```
"""

from ensemblenet.operations import (  # noqa: F401  they register their operations
    attention,
    convolution,
    indexing,
    linear,
    normalisation,
    pointwise,
    pooling,
    recurrent,
    reductions,
    shapes,
)
from ensemblenet.operations.coupling import Event, LayerSizes, Narrowed, Sizes, TensorRef, refs
from ensemblenet.operations.fusion import FIRST, FOLDED, SHARED, Layout, Program, Value
from ensemblenet.operations.registry import (
    Operation,
    fusing_operation,
    operation_named,
    operation_of,
    register,
)

__all__ = [
    "FIRST",
    "FOLDED",
    "SHARED",
    "Event",
    "LayerSizes",
    "Layout",
    "Narrowed",
    "Operation",
    "Program",
    "Sizes",
    "TensorRef",
    "Value",
    "fusing_operation",
    "operation_named",
    "operation_of",
    "refs",
    "register",
]
