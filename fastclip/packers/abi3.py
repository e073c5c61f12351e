"""The packer ``abi3``: csrc/abi3/, in C++ without torch's headers."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from ..modes import is_watched
from ..native import cpu_interface
from .cpu_kernels import CpuKernels
from .groups import Group, bump_versions
from .python import PythonPacker, is_flattened, unwatched


class Abi3Packer(PythonPacker):
    """What the module leaves alone, the packer in Python does."""

    name = "abi3"
    kernels: CpuKernels

    def __init__(self, module: Any, kernels: CpuKernels, torch_library: ctypes.CDLL) -> None:
        super().__init__(kernels)
        names = {name: cpu_interface.address_of(torch_library, name) for name in module.TORCH_FUNCTIONS}
        for name in ("fastclip_cpu_clip", "fastclip_cpu_table"):
            names[name] = cpu_interface.address_of(kernels.library, name)
        objects = {
            "tensor": Tensor,
            "parameter": torch.nn.Parameter,
            "is_neg": Tensor.is_neg,
            "untyped_storage": Tensor.untyped_storage,
            "storage_data_ptr": torch.UntypedStorage.data_ptr,
            "storage_nbytes": torch.UntypedStorage.nbytes,
            "bump_versions": bump_versions,
            "is_watched": is_watched,
        }
        module.bind(names, objects)
        self._module = module
        self.work_alone = module.work_alone

    def groups(self, items: list[Any], gradients_of: bool) -> list[Group] | None:
        if gradients_of and is_flattened(items):
            return None
        packed = self._module.pack(items, gradients_of)
        if packed is None:
            return super().groups(items, gradients_of)
        gradients, storages, groups = packed
        if len(groups) == 1:
            ((addresses, numels, _),) = groups
            return [Group(gradients, storages, addresses, numels, [])]
        made = []
        for addresses, numels, in_group in groups:
            positions = memoryview(in_group).cast("q").tolist()
            own = [gradients[i] for i in positions], [storages[i] for i in positions]
            made.append(Group(*own, addresses, numels, positions))
        return made

    @unwatched
    def clip_norm_fused(
        self, items: list[Any], of_parameters: bool, max_norm: Any, norm_type: Any, error_if_nonfinite: bool,
        per_tensor: bool, /,
    ) -> Any:  # fmt: skip
        if type(items) is not list or (of_parameters and is_flattened(items)):
            return None
        arguments = items, of_parameters, max_norm, norm_type, error_if_nonfinite, per_tensor
        done = self._module.clip_norm_fused(*arguments)
        return super().clip_norm_fused(*arguments) if done is None else done
