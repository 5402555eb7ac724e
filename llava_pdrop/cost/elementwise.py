"""Bytes that the element-wise parts of a training step read and write in bfloat16, counted kernel by kernel.

What is between the matrix products moves memory and hardly computes: its time is bytes by bandwidth. With ``eager``
kernels each operation of the modules of transformers 5 reads its inputs and writes its output once; the counts below
are those of a traced layer, forward and backward (tests/unit/cost/test_elementwise.py). With ``fused`` kernels a norm,
a rotary embedding and a gated product are one kernel each, which reads its inputs and writes its outputs once; residual
adds and the layouts of attention stay as they are. A number in bfloat16 has 2 bytes, in float32 4.

NOT in it: the merge of image features into the text, the tower's embedding and first norm, cosines of positions (all of
them under a hundredth of a step), and adding up the weight gradients of several micro-batches, 6 bytes a parameter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llava_pdrop.cost.flops import head_size, key_value_heads
from llava_pdrop.errors import check_name
from llava_pdrop.model.kernels import AUTO

HALF, FLOAT = 2, 4

KERNELS = ("eager", "fused")

MODELLED = ("llama", "mistral")
"""Decoders (``model_type``) whose layers are counted: others have biases or norms of their heads besides."""

CAST = HALF + FLOAT
"""Bytes of a number that changes its precision: read in one, written in the other."""

NORM = {"eager": (36, 84, 8), "fused": (4, 6, 4)}
"""Kernels -> bytes per number of an RMSNorm's input: forward, backward, and for the gradient of its weight besides.

Eager, forward: to float32 (6), square (8), mean (4), times the root (8), to bfloat16 (6), times the weight (4).
Backward: times the weight (4), to float32 (6), times the root (8), of the root (12 + 4), of the mean (4), of the square
(8 + 8 + 12), their sum (12), to bfloat16 (6); the weight's: a product (6) and its sum (2). Fused: the input and the
gradient once, for the weight once more."""

ROTARY = {"eager": (20, 28), "fused": (4, 4)}
"""Kernels -> bytes per number of queries and keys, forward and backward."""

GATED = {"eager": (10, 18), "fused": (6, 10)}
"""Kernels -> bytes per number of the gate: activation and product. Eager: 4 + 6 forward, three products of 6
backward; fused: gate and up in, product out, and in backward three in and two out."""

TOWER = {"width": (20, 46), "mlp": (14, 30)}
"""Bytes per number of a CLIP layer's stream and of its MLP, forward and backward. The stream: two norms in one kernel
each (4; 6 backward), two residual adds (6), and in backward the adds of the gradients of query, key, value (12), of
the branches (12) and the sums that are gradients of biases (10). The MLP: QuickGELU, which is three kernels (4, 4, 6),
backward five and a bias (28 + 2)."""


@dataclass(frozen=True)
class Moved:
    """Bytes read and written in ``forward``, in ``backward``, and ``again`` where the forward is recomputed."""

    forward: float
    backward: float
    again: float = 0.0

    def __add__(self, other: Moved) -> Moved:
        return Moved(self.forward + other.forward, self.backward + other.backward, self.again + other.again)


def kernels_of(choice: str) -> str:
    """Those of `KERNELS` that ``model.kernels: choice`` runs with on a GPU: all but ``eager`` are fused."""
    chosen = next(iter(AUTO["cuda"]), "eager") if choice == "auto" else choice
    return "eager" if chosen == "eager" else "fused"


def layer_bytes(text: Any, tokens: int, learns: bool = True, kernels: str = "eager") -> Moved:
    """Bytes of one decoder layer on ``tokens`` tokens.

    Args:
        text: the decoder's config, of a kind in `MODELLED`.
        learns: its weights have gradients.

    Raises:
        UserError: kernels that are none of `KERNELS`.
    """
    check_name("--kernels", kernels, KERNELS)
    hidden, gate = text.hidden_size, text.intermediate_size
    rotated = (text.num_attention_heads + key_value_heads(text)) * head_size(text)
    norm, norm_back, norm_weight = NORM[kernels]
    angles = 2 * 2 * HALF * head_size(text)  # cos and sin, read for queries and for keys
    add = 3 * HALF * hidden
    forward = 2 * norm * hidden + ROTARY[kernels][0] * rotated + angles + GATED[kernels][0] * gate + 2 * add
    backward = 2 * (norm_back + norm_weight * learns) * hidden + ROTARY[kernels][1] * rotated + angles
    backward += GATED[kernels][1] * gate
    backward += 2 * HALF * rotated  # the gradients of queries and keys become contiguous again
    backward += (2 + 1 + 2) * add  # gradients meet: behind two residuals, of gate and up, of query, key and value
    return Moved(tokens * forward, tokens * backward, tokens * (forward - add))  # the last add is not made again


def tower_layer_bytes(vision: Any, tokens: int) -> Moved:
    """Bytes of one layer of a CLIP tower that learns, on ``tokens`` tokens. torch has its norms as one kernel each."""
    width, mlp = vision.hidden_size, vision.intermediate_size
    forward, backward = (tokens * (TOWER["width"][way] * width + TOWER["mlp"][way] * mlp) for way in (0, 1))
    return Moved(forward, backward, forward - tokens * 3 * HALF * width)


def norm_bytes(hidden: int, tokens: int, learns: bool = True, kernels: str = "eager") -> Moved:
    """Bytes of one RMSNorm, ``hidden`` wide, on ``tokens`` tokens."""
    check_name("--kernels", kernels, KERNELS)
    forward, backward, weight = NORM[kernels]
    return Moved(tokens * hidden * forward, tokens * hidden * (backward + weight * learns))


def loss_bytes(vocabulary: int, labels: int) -> Moved:
    """Bytes of the cross entropy of ``labels`` rows of logits: to float32 and its logarithm of softmax; in backward its
    gradient, filled with zeros first, that of the logits, and back to bfloat16."""
    return Moved(labels * vocabulary * (CAST + 2 * FLOAT), labels * vocabulary * (FLOAT + 3 * FLOAT + CAST))


def projector_bytes(hidden: int, rows: int) -> Moved:
    """Bytes between and behind the projector's two products on ``rows`` feature rows: GELU, one kernel each way, and
    the sums that are gradients of biases."""
    return Moved(rows * hidden * 2 * HALF, rows * hidden * (3 + 1 + 1) * HALF)


def drop_bytes(text: Any, tokens: int, left: int, kernels: str = "eager", ranked: bool = True) -> Moved:
    """Bytes of one drop of ``tokens`` tokens, of which ``left`` stay. The ranking, where they are ``ranked`` by
    attention: the next layer's norm, the rotary embedding of its keys, their copy in float32 and the products with the
    query that read it; then the selection, whose backward adds into a stream of zeros."""
    keys, hidden = key_value_heads(text) * head_size(text), text.hidden_size
    scored = ranked * (NORM[kernels][0] * hidden + (ROTARY[kernels][0] + CAST + FLOAT) * keys)
    return Moved(tokens * scored + left * 2 * HALF * hidden, (tokens + 3 * left) * HALF * hidden)


def optimizer_bytes(parameters: float, master: bool = True) -> float:
    """Bytes of clipping and AdamW over so many parameters (one GPU's share): gradients to float32, their norm, their
    scaling, the update in one kernel (four numbers in, three out) and the weights back to bfloat16; without ``master``
    weights in float32 these are copied nowhere."""
    clipped, update = FLOAT + 2 * FLOAT, 7 * FLOAT
    return parameters * (clipped + update + 2 * CAST * master)
