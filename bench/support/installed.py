"""What is timed when it is there: NVIDIA Apex, cudnn-frontend, and rsfast's own extension.

None can be required: Apex has to be built from source (what PyPI calls apex is unrelated), and
both need a GPU. Their results are checked before they are timed, like everybody's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["INSTALLED", "apex_batch_norm", "apex_cross_entropy", "cudnn_batch_norm", "left_out"]

# What each rival is found by.
_MODULES = {
    "apex_groupbn": "bnp",
    "apex_xentropy": "xentropy_cuda",
    "cudnn_graph": "cudnn",
    "rsfast_cuda": "rsfast._C",
}
INSTALLED = {name for name, module in _MODULES.items() if importlib.util.find_spec(module)}


def left_out() -> str:
    """Names of what is not installed."""
    return ", ".join(sorted(set(_MODULES) - INSTALLED)) or "none"


def apex_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy by apex.contrib.xentropy; its default padding_idx would drop class 0."""
    from apex.contrib.xentropy import SoftmaxCrossEntropyLoss

    return SoftmaxCrossEntropyLoss.apply(logits, labels, 0.0, -1, True).mean()


def apex_batch_norm(
    levels: Sequence[Tensor],
    residuals: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str | None,
) -> Callable[[], list[Tensor]] | None:
    """One apex.contrib.groupbn layer per level; None for what it has no kernel for.

    It takes float16, and an addition only with a ReLU.
    """
    if levels[0].dtype != torch.float16 or activation == "relu6" or levels[0].shape[1] % 8:
        return None
    if residuals is not None and activation is None:
        return None
    from apex.contrib.groupbn.batch_norm import BatchNorm2d_NHWC

    norms = []
    for weight, bias in zip(weights, biases, strict=True):
        norm = BatchNorm2d_NHWC(len(weight), fuse_relu=activation == "relu").cuda()
        norm._parameters.update(weight=weight, bias=bias)  # the leaves that gradients are asked of
        norms.append(norm)
    shortcuts = [None] * len(levels) if residuals is None else residuals

    def run() -> list[Tensor]:
        ys = []
        for norm, x, z in zip(norms, levels, shortcuts, strict=True):
            z = None if z is None else z.permute(0, 2, 3, 1)
            ys.append(norm(x.permute(0, 2, 3, 1), z).permute(0, 3, 1, 2))
        return ys

    return run


def cudnn_batch_norm(
    levels: Sequence[Tensor],
    residuals: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    running: Sequence[tuple[Tensor, Tensor]],
    activation: str | None,
) -> Callable[[], list[Tensor]] | None:
    """Forward as one cuDNN graph per level (NormAddRelu); None for what it does not support."""
    if activation == "relu6" or levels[0].shape[1] % 8:
        return None
    import cudnn

    handle = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
    plans = []
    for index, x in enumerate(levels):
        dtype = {torch.float16: "HALF", torch.bfloat16: "BFLOAT16"}[x.dtype]
        graph = cudnn.pygraph(
            io_data_type=getattr(cudnn.data_type, dtype),
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            handle=handle,
        )
        mean, var = (t.view(1, -1, 1, 1) for t in running[index])
        inputs = {
            "input": x.detach(),
            "scale": weights[index].detach().view(1, -1, 1, 1),
            "bias": biases[index].detach().view(1, -1, 1, 1),
            "in_running_mean": mean,
            "in_running_var": var,
            "epsilon": torch.full((1, 1, 1, 1), 1e-5),
            "momentum": torch.full((1, 1, 1, 1), 0.1),
        }
        nodes = {name: graph.tensor_like(tensor) for name, tensor in inputs.items()}
        y, *moments = graph.batchnorm(name="norm", **nodes)
        pack = {nodes[name]: tensor for name, tensor in inputs.items()}
        saved = [torch.empty_like(mean), torch.empty_like(var), mean, var]
        for node, tensor in zip(moments, saved, strict=True):
            node.set_output(True).set_data_type(cudnn.data_type.FLOAT)
            pack[node] = tensor
        if residuals is not None:
            shortcut = graph.tensor_like(residuals[index].detach())
            y = graph.add(name="add", a=y, b=shortcut)
            pack[shortcut] = residuals[index].detach()
        if activation == "relu":
            y = graph.relu(name="relu", input=y)
        y.set_output(True)
        output = torch.empty_like(x)
        pack[y] = output
        try:
            graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        except cudnn.cudnnGraphNotSupportedError:
            return None
        workspace = torch.empty(graph.get_workspace_size(), device="cuda", dtype=torch.uint8)
        plans.append((graph, pack, workspace, output))

    def run() -> list[Tensor]:
        for graph, pack, workspace, _ in plans:
            graph.execute(pack, workspace, handle=handle)
        return [output for *_, output in plans]

    return run
