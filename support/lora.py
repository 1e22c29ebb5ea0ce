"""Adapters of low rank (LoRA, Hu et al., 2021) beside frozen linear layers."""
import torch
import torch.nn as nn
import torch.nn.functional as F

from support.model_check import blocks_of

ADAPTER_SCALE = 2  # CHOICE: alpha / rank of Hu et al., the same at every rank


class LoRA(nn.Module):
    """A frozen linear layer W with an adapter of low rank, y = W x + 2 B A x; B starts at 0."""

    def __init__(self, base, rank):
        super().__init__()
        self.base = base
        with torch.device("meta"):
            a = torch.empty(rank, base.in_features, dtype=torch.float32)
            b = torch.empty(base.out_features, rank, dtype=torch.float32)
        self.lora_a = nn.Parameter(a)
        self.lora_b = nn.Parameter(b)

    def forward(self, x):
        """(..., in) -> (..., out)."""
        y = self.base(x)
        a = self.lora_a.to(x.dtype)  # (rank, in)
        b = self.lora_b.to(x.dtype)  # (out, rank)
        low = F.linear(x, a)         # (..., rank)
        return y + ADAPTER_SCALE * F.linear(low, b)


def add_adapters(model, rank):
    """Freeze a model and give every linear layer of its blocks an adapter, on the meta device."""
    model.requires_grad_(False)
    blocks = blocks_of(model)
    for name, module in list(blocks.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            adapted = LoRA(module, rank)
            setattr(blocks.get_submodule(parent), child, adapted)


def initial_adapter(name, shape, seed):
    """The float32 tensor with which an adapter's A (random, from `seed`) or B (zero) starts."""
    if name.endswith("lora_b"):
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) / shape[1] ** 0.5


def merged_weight(weight, lora_a, lora_b):
    """The float32 (out, in) weight of a plain linear layer that computes what `LoRA` does."""
    change = ADAPTER_SCALE * lora_b @ lora_a
    return weight.float() + change


def plain_name(name):
    """A parameter's name as it is without adapters, which is its name in a checkpoint.

    >>> plain_name("model.layers.0.mlp.up_proj.base.weight")
    'model.layers.0.mlp.up_proj.weight'
    """
    return name.replace(".base.", ".")
