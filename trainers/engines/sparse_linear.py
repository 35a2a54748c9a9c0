"""A linear layer whose weights are stored without zeros, in torch's compressed sparse rows (CSR)."""

from __future__ import annotations

from torch import Tensor, nn


class SparseRows(nn.Module):
    """Computes what a dense :class:`torch.nn.Linear` computes, for inference.

    Args:
        dense: the layer that it replaces.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", dense.weight.detach().to_sparse_csr())
        self.register_buffer("bias", None if dense.bias is None else dense.bias.detach().unsqueeze(1))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (…, inputs) to outputs (…, outputs)."""
        columns = inputs.reshape(-1, inputs.shape[-1]).T
        outputs = self.weight @ columns
        if self.bias is not None:
            outputs = outputs + self.bias
        return outputs.T.reshape(*inputs.shape[:-1], -1)
