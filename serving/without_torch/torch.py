"""A stub of torch for TorchServe's workers on a CPU.

TorchServe imports torch to ask whether an answer is a tensor. Here OpenVINO computes and answers
are dictionaries, so for that one question each worker would hold some 250 MB and start 2 s later.
"""


class Tensor:
    """What no answer is an instance of."""
