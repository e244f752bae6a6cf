"""The Hessian as a LinearOperator: products alone, on which every solver of scipy runs in O(P) memory."""

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from .derivatives import LossFn, check_loss_fn, gradient, product, warn_if_constant
from .parameters import Parameters, Params


class HessianOperator(LinearOperator):
    """The Hessian of a loss as a symmetric operator (P, P), which is never a matrix.

    ```python
    model, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    op = HessianOperator(lambda: model(x)[0].square().mean(), model)
    top = scipy.sparse.linalg.eigsh(op, k=5, return_eigenvectors=False)
    ```

    The graph of the gradient is kept, so a product costs one backward pass through it and no call of the
    loss. Before each product the parameters are compared with those it was made at; if an optimiser step or
    anything else has changed one in place, the loss is called anew: products are always of the Hessian at
    the parameters' present values; if one was replaced, converted to another dtype or frozen, RuntimeError
    says so. What else the loss reads (data, dropout masks, modes) stays as it was in
    its last call; for new data make a new operator.

    Args:
        loss_fn: as for `hessian`, warning included. It is called once here.
        params: as for `hessian`.

    Attributes:
        shape: (P, P).
        dtype: numpy's float64 if the parameters are, or promote to, float64, else float32. Products take and
            give arrays on the host, wherever the parameters are.
        index: name -> rows, as `parameter_index` gives them.

    Raises:
        TypeError, ValueError, RuntimeError: as `hessian`; a product also for a complex vector.
        FloatingPointError: a product is not finite, which solvers would not survive.
    """

    def __init__(self, loss_fn: LossFn, params: Params) -> None:
        check_loss_fn(loss_fn)
        self._loss_fn = loss_fn
        self._parameters = Parameters(params)
        self.index = self._parameters.index
        dtype = np.float64 if self._parameters.dtype == torch.float64 else np.float32
        super().__init__(dtype, (self._parameters.size, self._parameters.size))
        self._evaluate()
        warn_if_constant(self._gradients)

    def _evaluate(self) -> None:
        self._gradients: list[Tensor | None] = []  # the old graph goes before there is a new one
        self._gradients = gradient(self._loss_fn, self._parameters)
        self._versions = [tensor._version for tensor in self._parameters.tensors]
        self._values = [tensor.detach().clone() for tensor in self._parameters.tensors]

    def _changed(self) -> bool:
        self._parameters.check_unchanged()
        # Versions, since torch refuses a graph whose tensors were written to, even with the same values;
        # values, since writing through `.data` leaves the version as it is.
        return any(
            tensor._version != version or not torch.equal(tensor, value)
            for tensor, version, value in zip(
                self._parameters.tensors, self._versions, self._values, strict=True
            )
        )

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        if np.iscomplexobj(x):
            raise TypeError(f"x: expected a real dtype, got {x.dtype}")
        if self._changed():
            self._evaluate()
        vector = torch.from_numpy(np.array(x, self.dtype).reshape(-1)).to(self._parameters.device)
        result: np.ndarray = product(self._gradients, self._parameters, vector).cpu().numpy()
        if not np.isfinite(result).all():
            raise FloatingPointError(
                "the product is not finite: the loss's second derivatives, or x, are not"
            )
        return result

    def _adjoint(self) -> "HessianOperator":
        return self

    def _transpose(self) -> "HessianOperator":
        return self
