"""apple/ml-starflow, the STARFlow of its authors, in PyTorch (arXiv 2506.06276).

Its options are those that its Jacobi sampler requires, rotary positions and a start token.
"""

import importlib

from tests.peers import torch_cpu
from tests.peers.work import Sizes, Work

products = torch_cpu.products


def _model(sizes: Sizes):
    flow = importlib.import_module("transformer_flow")
    return flow.Model(
        in_channels=3, img_size=sizes.side, patch_size=sizes.patch, channels=sizes.width,
        num_blocks=sizes.blocks, layers_per_block=[sizes.layers], head_dim=sizes.head, rope=True,
        sos=True)


def train_step(sizes: Sizes) -> Work:
    """A step of maximum likelihood."""
    model, x = _model(sizes), torch_cpu.images(sizes)

    def loss():
        z, _, _, log_dets = model(x)
        return model.get_loss(z, log_dets)["loss"]

    return torch_cpu.adamw(model, loss, 3 * sizes.forward_flops())


def inverse(sizes: Sizes, how: str) -> Work:
    """Its sampler, token by token with a KV cache, or block-wise Jacobi sweeps at its tolerance."""
    if how != "parallel":
        return torch_cpu.inverting(_model(sizes), sizes, jacobi=False)
    distributed = torch_cpu.torch().distributed
    if not distributed.is_initialized():  # its sweeps end together
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    return torch_cpu.inverting(
        _model(sizes), sizes, "stops at a relative squared change of 1e-3", jacobi=True)
