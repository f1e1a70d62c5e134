"""AdamW with its moments in 8 bits, by bitsandbytes (the only module that imports it).

Dettmers et al. 2022, "8-bit optimizers via block-wise quantization" (ICLR): each block of 256 entries is kept in 8 bits
with a scale of its own, so a parameter's two moments take 2 bytes instead of 8. As the paper advises (§2.3), embeddings
keep 32 bits; bitsandbytes leaves 32 bits to parameters of fewer than 4,096 entries too. Use it where the moments, 8
bytes for each weight that learns, do not fit beside weights and gradients; full fine-tuning of a large generator, not
LoRA. The numbers are near those of AdamW, not the same.
"""

from typing import Any

import torch
from torch import nn

from rag_lightning.errors import ConfigError, MissingExtraError

MIN_ENTRIES = 4096
"""Smaller parameters keep 32 bits; bitsandbytes' own default, passed on so that the check below cannot drift."""


def adamw_8bit(
    groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float, model: nn.Module
) -> torch.optim.Optimizer:
    """Returns the optimiser.

    Args:
        groups: Parameter groups with their rates and decays.
        betas: Decays of the two moments.
        eps: Denominator's floor.
        model: Where the parameters are from; tells which are embeddings.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
        ConfigError: No parameter would keep 8 bits.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise MissingExtraError("bitsandbytes", "bitsandbytes", "optim.name=adamw_8bit") from error
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    whole = {id(module.weight) for module in embeddings}
    learning = [parameter for group in groups for parameter in group["params"]]
    if not any(p.numel() >= MIN_ENTRIES and id(p) not in whole for p in learning):
        raise ConfigError(
            f"optim.name=adamw_8bit: expected a parameter of {MIN_ENTRIES:,} entries or more beside embeddings, which "
            f"keep 32 bits, among the {len(learning)} that learn; came none, so nothing would be saved. Use "
            "optim.name=adamw."
        )
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    manager.initialize()  # it is one for the whole process, and knows parameters by place: forget another run's
    for module in embeddings:
        manager.register_module_override(module, "weight", {"optim_bits": 32})
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
        groups, betas=betas, eps=eps, min_8bit_size=MIN_ENTRIES
    )
    return optimizer
