"""Make a built model ready to train."""

from __future__ import annotations

from torch.optim import Optimizer
from transformers import PreTrainedModel

from peptrain.config import RunConfig
from peptrain.distributed.world import World
from peptrain.execution.attention import attend_without_masks
from peptrain.execution.compile import checkpoint_activations, compile_layers
from peptrain.execution.forward_backward import (
    ForwardBackward,
    make_forward_backward,
    uses_cuda_graph,
    uses_triton,
)
from peptrain.execution.label_loss import LabelLoss
from peptrain.execution.loss import NextTokenLoss
from peptrain.execution.padding import pad_mlps
from peptrain.methods.base import Method
from peptrain.models.hf import dtype_of
from peptrain.models.sites import find_sites
from peptrain.optim.adamw import check_groups


def prepare(
    model: PreTrainedModel, config: RunConfig[Method], here: World, phase: int
) -> tuple[Optimizer, ForwardBackward]:
    """Move the model to its device, apply kernels and compilation, create the optimizer."""
    t = config.train
    assert t.precision is not None
    if model.device != here.device:
        model.to(here.device)  # type: ignore[arg-type]
    model.train()
    on_gpu = here.device.type == "cuda"
    # Fine-tuning has padded sequences of many lengths: no graph, and masks are needed.
    whole_windows = not config.tune.task
    maskless = on_gpu and whole_windows and attend_without_masks(model, t.seq_len)
    recorded = uses_cuda_graph(t.cuda_graph, t.compile and maskless, here)
    if uses_triton(t.kernels, t.precision, here.device, recorded=recorded):
        config.method.fuse(model)
    if on_gpu:
        pad_mlps(model)
    if t.checkpoint_activations:
        checkpoint_activations(model)
    if t.compile:
        compile_layers(model, t.memory_budget)
    optimizer = config.method.optimizer(model, find_sites(model), config.optim, phase)
    check_groups(optimizer, model, config.optim, config.method.optim_defaults)
    loss = NextTokenLoss(model, compile=t.compile) if whole_windows else LabelLoss(model)
    exchange = dtype_of(t.exchange) if t.exchange else None
    return optimizer, make_forward_backward(
        loss, t.precision, here, recorded=recorded, exchange=exchange
    )
