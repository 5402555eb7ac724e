"""What LoRA changes in a plan: the decoder's own matrices get no gradients, the adapters beside them do.

The backward of a frozen matrix is one product, the gradient of its input. An adapter of rank r beside a matrix from I
to O numbers has r (I + O) parameters, and each costs two operations a token in forward and four in backward.
"""

from __future__ import annotations

from typing import Any

from llava_pdrop.checkpoint.lora import by_pattern
from llava_pdrop.config.schema import Config, LoraSection
from llava_pdrop.cost.flops import CountedStep, head_size, key_value_heads
from llava_pdrop.model.stream import layout_of_layers

NOT_MODELLED = "what the adapters keep for their backward (a copy of each input after dropout), quantised weights"


def learning(config: Config) -> frozenset[str]:
    """Parts whose own weights get gradients, as `step_flops` asks; a name it does not know keeps the backward on."""
    whole = frozenset(config.model.trainable)
    return whole if config.lora is None else whole - {"language_model"} | {"adapters"}


def adapter_parameters(text: Any, section: LoraSection | None) -> list[int]:
    """Parameters of the adapters in each decoder layer; none without ``section``."""
    hidden, inner = text.hidden_size, text.intermediate_size
    query, key = text.num_attention_heads * head_size(text), key_value_heads(text) * head_size(text)
    sides = {"q_proj": hidden + query, "k_proj": hidden + key, "v_proj": hidden + key, "o_proj": query + hidden}
    attention = {f"self_attn.{name}": numbers for name, numbers in sides.items()}
    mlp = {f"mlp.{name}_proj": hidden + inner for name in ("gate", "up", "down")}
    if section is None:
        return [0] * text.num_hidden_layers
    adapted = {"attention": attention, "mlp": mlp, "both": attention | mlp}[section.target]
    return [
        sum(
            numbers * int(by_pattern(section.rank_pattern, f"model.language_model.layers.{layer}.{name}", section.r))
            for name, numbers in adapted.items()
        )
        for layer in range(text.num_hidden_layers)
    ]


def adapter_flops(step: CountedStep, section: LoraSection | None) -> float:
    """Operations of the adapters in a step."""
    text = step.config.text_config
    layouts = layout_of_layers(step.layouts, step.schedule, text.num_hidden_layers)
    again = range(text.num_hidden_layers)[: step.recomputed.layers]
    return float(
        sum(
            2 * layouts[layer].tokens * parameters * (3 + (layer in again))
            for layer, parameters in enumerate(adapter_parameters(text, section))
        )
    )
