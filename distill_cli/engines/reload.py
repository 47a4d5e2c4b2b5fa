"""Replace a vLLM model's weights from tensors in memory, inside its worker; and check that all of them arrived.

vLLM's own reload takes the model's layers apart, collects what the model's `load_weights` gives to each parameter's
loader, processes a layer as after loading, and copies the result into the old tensors. Three things are lost there, and
each leaves an old weight in place without an error: copies that a model makes without a loader (`param.copy_`, in
gpt-oss), experts on CPUs, and a head on CPUs that is tied to the embedding.

Importing this module imports neither vLLM nor torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from distill_cli.engines.reach import reaches

if TYPE_CHECKING:
    import torch

LAYERWISE = "vllm.model_executor.model_loader.reload.layerwise"
COPIES_DIRECTLY = "_distill_copies_directly"
"""Attribute of a model that was loaded once: whether tensors are copied into its parameters without a loader."""
DIGEST_ROWS = 2**22
"""Elements of a tensor that are digested at a time."""


@reaches("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.reload_weights", parameter="weights_iterator")
@reaches("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.reload_weights", only="cuda")  # the newer runner
def load_weights(worker: Any, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Replace the model's weights in place with full tensors under their names in the model's files.

    Symptom: `LLM` takes new weights from disk alone; `model.load_weights` without vLLM's reload around it fails on the
    layouts that vLLM makes after loading.
    No longer needed when: `LLM` takes an iterator of tensors.
    """
    import torch

    model = worker.get_model()
    if worker.device.type == "cpu":
        _forget_kernels(model)
    if vars(model).get(COPIES_DIRECTLY, True):  # not known before the first time
        weights = with_direct_copies(model, weights)
    with torch.no_grad():
        worker.model_runner.reload_weights(weights_iterator=weights)
    if worker.device.type == "cpu":
        _pack_tied_head(model)


@reaches("vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method", "UnquantizedFusedMoEMethod", only="cpu")
def _forget_kernels(model: Any) -> None:
    """Let the layers of experts be processed as for the first time.

    Symptom: on CPUs experts' weights are packed the first time alone; later ones are copied as they are, and read as if
    they were packed (log-probabilities off by 0.3).
    No longer needed when: `UnquantizedFusedMoEMethod._setup_kernel` packs each time.
    """
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if hasattr(method, "moe_kernel"):
            method.moe_kernel = None


def _pack_tied_head(model: Any) -> None:
    """Pack the head again.

    Symptom: on CPUs the head is a packed copy, which vLLM does not make again if it is tied to the embedding: the
    engine would go on with the old head, silently (log-probabilities off by 0.2 to 0.35).
    No longer needed when: a reload processes heads that are tied.
    """
    if not any(getattr(one, "tie_word_embeddings", False) for one in (model.config, model.config.get_text_config())):
        return
    for name, module in model.named_modules():  # in a multimodal model it is the text model's
        if name.split(".")[-1] == "lm_head" and hasattr(module, "quant_method"):
            module.quant_method.process_weights_after_loading(module)


@reaches(LAYERWISE, "get_layerwise_info")
@reaches(LAYERWISE, "materialize_layer")
@reaches(LAYERWISE, "_get_original_loader")
@reaches(LAYERWISE, "_copy_and_restore_kernel_tensors")
def with_direct_copies(model: Any, weights: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights to a reload of `model`, and complete the layers whose tensors it copies without a loader.

    Symptom: a reload's parameters are empty (on the device meta), and only their loaders remember what they are given.
    gpt-oss copies experts and sinks into them directly: nothing happens, and the layer keeps its old weights.
    No longer needed when: a reload keeps what is copied.
    """
    from vllm.model_executor.model_loader.reload import layerwise

    # The reload has emptied the parameters by the time that it asks for the first weight.
    owners = {
        tensor.untyped_storage()._cdata: (layer, name)
        for layer in model.modules()
        for name, tensor in layer.named_parameters(recurse=False)
        if tensor.is_meta
    }
    copies = _direct_copies(owners)
    with copies:
        yield from weights
    setattr(model, COPIES_DIRECTLY, bool(copies.by_layer))
    for layer, found in copies.by_layer.items():
        info = layerwise.get_layerwise_info(layer)
        layerwise.materialize_layer(layer, info)
        for name, size, stride, offset, source in found:
            getattr(layer, name).data.as_strided(size, stride, offset).copy_(source)
        for name, arguments in info.loaded_weights:
            param = getattr(layer, name)
            arguments.arguments["param"] = param
            layerwise._get_original_loader(param)(*arguments.args, **arguments.kwargs)
        method: Any = getattr(layer, "quant_method", None)
        if hasattr(method, "process_weights_after_loading"):
            method.process_weights_after_loading(layer)
        layerwise._copy_and_restore_kernel_tensors(layer, info)
        info.reset()


def _direct_copies(owners: dict[int, tuple[Any, str]]) -> Any:
    """Return a context that remembers the tensors that are copied into empty parameters without a loader."""
    from torch import Tensor
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    class DirectCopies(TorchFunctionMode):
        def __init__(self) -> None:
            self.by_layer: dict[Any, list[tuple[str, Any, Any, int, Tensor]]] = {}

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is not Tensor.copy_ or not args[0].is_meta or _get_current_dispatch_mode() is not None:
                return func(*args, **(kwargs or {}))  # a loader's copies are counted by a dispatch mode
            target, source = args[:2]
            layer, name = owners.get(target.untyped_storage()._cdata, (None, ""))
            if layer is not None and not source.is_meta:
                place = target.size(), target.stride(), target.storage_offset()
                self.by_layer.setdefault(layer, []).append((name, *place, source))
            return target

    return DirectCopies()


def tensors_of(worker: Any) -> dict[str, torch.Tensor]:
    """Return the model's parameters and persistent buffers, in the layout in which it computes."""
    model = worker.get_model()
    persistent = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in persistent.items() if tensor is not None and tensor.numel()}


def digests(worker: Any) -> dict[str, tuple[int, ...]]:
    """Return a digest of each of `tensors_of`, which changes if one bit does."""
    import torch

    def digest(tensor: torch.Tensor) -> tuple[int, ...]:
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        sums = torch.zeros(2, dtype=torch.int64, device=tensor.device)
        for begin in range(0, len(flat), DIGEST_ROWS):
            part = flat[begin : begin + DIGEST_ROWS].to(torch.int64)
            place = torch.arange(begin + 1, begin + 1 + len(part), device=part.device)
            sums += torch.stack([part.sum(), (part * place).sum()])  # wraps around
        return tuple(sums.tolist())

    return {name: digest(tensor) for name, tensor in tensors_of(worker).items()}


def fill_with_nan(worker: Any, untouched: frozenset[str]) -> None:
    """Overwrite the model's parameters, so that one that a sync does not bring is seen.

    Args:
        untouched: parts of names: parameters with one of them keep their values.
    """
    for name, param in worker.get_model().named_parameters():
        if param.is_floating_point() and untouched.isdisjoint(name.split(".")):
            param.data.fill_(float("nan"))


def nan_tensors(worker: Any) -> list[str]:
    """Return the names of the model's tensors that hold a NaN."""
    found = tensors_of(worker)
    return [name for name, tensor in found.items() if tensor.is_floating_point() and bool(tensor.isnan().any())]
