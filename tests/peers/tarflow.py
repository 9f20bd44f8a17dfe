"""apple/ml-tarflow, the TarFlow of its authors, in PyTorch (arXiv 2412.06329)."""

import importlib

from tests.peers import torch_cpu
from tests.peers.work import Sizes, Work

products = torch_cpu.products


def _model(sizes: Sizes):
    flow = importlib.import_module("transformer_flow")
    return flow.Model(3, sizes.side, sizes.patch, sizes.width, sizes.blocks, sizes.layers)


def train_step(sizes: Sizes) -> Work:
    """A step of maximum likelihood."""
    model, x = _model(sizes), torch_cpu.images(sizes)

    def loss():
        z, _, log_dets = model(x)
        return model.get_loss(z, log_dets)

    return torch_cpu.adamw(model, loss, 3 * sizes.forward_flops())


def inverse(sizes: Sizes, how: str) -> Work | None:
    """Its sampler, token by token with a KV cache; it has no parallel one."""
    return torch_cpu.inverting(_model(sizes), sizes) if how == "sequential" else None
