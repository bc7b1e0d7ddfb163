"""What each part of a model adds to the final stream, and so to a difference of logits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from devmon.anatomy.anatomy import Anatomy
from devmon.anatomy.sites import Reads


class Contributions:
    """What each part adds to the final stream at the measured places, `parts` (prompt, component, d) in float64."""

    def __init__(self, anatomy: Anatomy, reads: Reads) -> None:
        self.anatomy = anatomy
        self.names = ["embedding"]
        parts = [reads["resid_pre", 0][:, None]]
        with torch.no_grad():
            for layer in range(anatomy.layers):
                # attention, split by heads: what stands after it is linear once its scale is frozen
                heads = torch.einsum("nhe,hed->nhd", reads["z", layer], anatomy.W_O(layer).double())
                bias = anatomy.bias(layer, "out").double().expand(len(heads), -1)
                end = anatomy.end_norm(layer, "attention")
                scale = end.scale((heads.sum(1) + bias).to(anatomy.W_O(layer).dtype)).double()  # (prompt, 1)
                parts.append(end.linear(heads, scale[:, None]))
                parts.append((end.linear(bias, scale) + end.bias)[:, None])
                self.names += [f"head {layer}.{head}" for head in range(anatomy.heads)] + [f"attention bias {layer}"]
                if anatomy.has_mlp:
                    parts.append(reads["mlp_out", layer][:, None])
                    self.names.append(f"mlp {layer}")
            # the final norm, its scale frozen at that of the whole stream
            stream = reads["resid_post", anatomy.layers - 1]
            scale = anatomy.final_norm.scale(stream.to(anatomy.W_O(0).dtype)).double()
            self.parts = anatomy.final_norm.linear(torch.cat(parts, 1), scale[:, None])
        self.names.append("bias")

    def attribution(self, answers: Tensor, foils: Tensor) -> np.ndarray:
        """(prompt, component), the last one the biases after the stream."""
        with torch.no_grad():
            unembed = self.anatomy.W_U
            answers, foils = answers.to(unembed.device), foils.to(unembed.device)
            toward = (unembed[:, answers].double() - unembed[:, foils].double()).T  # (prompt, d)
            bias = getattr(self.anatomy.unembedding, "bias", None)
            rest = toward @ self.anatomy.final_norm.bias.double()
            rest = rest if bias is None else rest + bias[answers] - bias[foils]
            split = torch.einsum("ncd,nd->nc", self.parts, toward)
            return torch.cat([split, rest[:, None]], 1).cpu().numpy()
