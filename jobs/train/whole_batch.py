"""A network that several processes train as one would, each on its share of every batch.

Gradients are averaged over the processes. Dropout draws, and batch norm takes its statistics, for
the whole batch; both are traceable, so that the compiled step stays one graph.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own idiom
from torch.nn.parallel import DistributedDataParallel

from jobs import distributed
from jobs.errors import ConfigurationError


def parallel(network: nn.Module, batch_size: int) -> nn.Module:
    """The network as the training step calls it; its dropout and batch norm change in place.

    Raises:
        ConfigurationError: a batch has fewer images than there are processes.
    """
    processes = distributed.size()
    if processes == 1:
        return network
    if batch_size < processes:
        message = f"optim.batch_size: {batch_size} is less than {processes} processes"
        raise ConfigurationError(message)
    assert isinstance(network.dropout, nn.Dropout)
    network.dropout = WholeBatchDropout(network.dropout.p, batch_size)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = WholeBatchNorm  # with its parameters, buffers and place
    parallel = DistributedDataParallel(network, gradient_as_bucket_view=True)
    # Buffers are batch norm's, and the same in every process. As an argument it is deprecated from
    # torch 2.13 on, for one that earlier versions do not have.
    parallel.broadcast_buffers = False
    return parallel


class WholeBatchDropout(nn.Dropout):
    """Draws for the whole batch in every process, and applies what falls on its own share."""

    def __init__(self, p: float, batch_size: int) -> None:
        super().__init__(p)
        self.batch_size = batch_size

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        drawn = F.dropout(x.new_ones(self.batch_size, *x.shape[1:]), self.p)
        return x * drawn[distributed.share(self.batch_size)]


class WholeBatchNorm(nn.BatchNorm2d):
    """Batch norm over all processes, with one message of 2C + 1 sums each way.

    torch's SyncBatchNorm waits for the device to select by masks, and breaks the graph at every
    layer.
    """

    def forward(self, x_NCHW: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x_NCHW)
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        # From a value near the mean: squares of large numbers would drown a small variance.
        x = x_NCHW.float() - self.running_mean[:, None, None]
        images = x.new_full((1,), x.numel() / self.num_features)
        sums = torch.cat([x.sum((0, 2, 3)), x.square().sum((0, 2, 3)), images])
        total, squares, count = _over_processes(sums).split([*[self.num_features] * 2, 1])
        mean = total / count
        variance = squares / count - mean.square()
        scale = self.weight * (variance + self.eps).rsqrt()
        # From x, which autograd keeps for the squares anyway: it would have to keep x - mean, too.
        y: Tensor = x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
            self.running_mean += mean * self.momentum
        return y.to(x_NCHW.dtype)


@torch.library.custom_op("inception_transfer::over_processes", mutates_args=())
def _over_processes(values: Tensor) -> Tensor:
    """The sum over all processes. An operator of its own, as torch's functional all-reduce has a
    gradient in its latest versions only, and DDP refuses autograd functions in compiled code."""
    return distributed.total(values)


@_over_processes.register_fake
def _(values: Tensor) -> Tensor:
    return torch.empty_like(values)


def _gradient(_: object, of_sum: Tensor) -> Tensor:
    """Each process's values are in the losses of all."""
    total: Tensor = _over_processes(of_sum)
    return total


_over_processes.register_autograd(_gradient)
