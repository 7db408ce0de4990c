# SPDX-License-Identifier: Apache-2.0
"""Read and write safetensors files without trusting them, a tensor or a part of one at a time.

Why not the library's reader: it maps the whole file, so resident memory grows with the file, and a file that is cut
short meanwhile ends the process with SIGBUS; and of two entries with one name it silently takes the last. Here every
read is a pread of exactly the bytes asked for, and a header is refused unless it describes the whole file exactly.

    8 bytes: N, little endian | N bytes of JSON, padded with spaces | the tensors' data, without holes

Raises CheckpointError, one line that names the path, for whatever is wrong with a file or a disk.
"""

from lora_megatron.strict_safetensors.header import DTYPE_NAMES, DTYPES, Entry
from lora_megatron.strict_safetensors.reader import BLOCK, SafetensorsFile, TensorSlice
from lora_megatron.strict_safetensors.writer import SafetensorsWriter

__all__ = ["BLOCK", "DTYPES", "DTYPE_NAMES", "Entry", "SafetensorsFile", "SafetensorsWriter", "TensorSlice"]
