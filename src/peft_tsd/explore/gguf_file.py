"""The tensors of a GGUF file, de-quantized one at a time, by the names and in the row order of transformers.

llama.cpp reorders the rows of some weights (q and k, for its rotary embeddings) and calls tensors by names of its own;
transformers undoes both when it loads a GGUF file, and its tables are used here.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import modeling_gguf_pytorch_utils as reading

from ..errors import one_line
from .errors import ExploreError

try:
    from transformers.integrations.gguf.utils import is_gguf_arch_supported
except ImportError:  # transformers that reads every file tensor by tensor

    def is_gguf_arch_supported(architecture: str) -> bool:
        return False


class GgufFile:
    """One GGUF file.

    Attributes:
        keys: The name of the tensor in the file of every parameter of the model that is in it.
    """

    def __init__(self, path: Path, name: str, model: PreTrainedModel) -> None:
        """
        Raises:
            ExploreError: The file is damaged, or its architecture is one whose tensors are not read one at a time.
        """
        from gguf import GGUFReader

        self._path = path
        try:
            reader = GGUFReader(path)
            self._tensors = {tensor.name: tensor for tensor in reader.tensors}
            architecture = reading.read_field(reader, "general.architecture")[0]
            if is_gguf_arch_supported(architecture):
                raise NotImplementedError(f"transformers reads {architecture} files as a whole")
            processor_class = reading.TENSOR_PROCESSORS.get(architecture, reading.TensorProcessor)
            self._processor = processor_class(config=model.config.to_dict())
            self._names = reading.get_gguf_hf_weights_map(model, self._processor)
        except (ValueError, OSError, KeyError, IndexError, NotImplementedError, struct.error) as error:
            raise ExploreError(
                f"{name} cannot be read tensor by tensor ({one_line(error)}); give the model in safetensors files"
            ) from None
        self.keys = {parameter: key for key, parameter in self._names.items() if key in self._tensors}

    def read(self, key: str) -> Tensor:
        """The de-quantized tensor, float32, in the shape and order of transformers' parameter."""
        from gguf import dequantize

        tensor: Any = self._tensors[key]
        # A mapping of its own, so that what is read of the file does not stay in memory.
        data = np.memmap(
            self._path, dtype=tensor.data.dtype, mode="r", offset=int(tensor.data_offset), shape=tensor.data.shape
        )
        values = self._processor.process(
            weights=dequantize(data, tensor.tensor_type),
            name=key,
            tensor_key_mapping=self._names,
            parsed_parameters={"tensors": {}},
        ).weights
        return torch.from_numpy(np.array(values))
