# SPDX-License-Identifier: Apache-2.0
"""One process that stands where a rank of a large job would stand, to build that rank's model without its peers.

torch's `fake` backend answers every collective at once without moving anything. Groups, ranks and sizes are real, so
megatron-core cuts a model exactly as it would on the cluster; results of collectives are not, so nothing is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch.testing._internal.distributed.fake_pg import FakeStore  # importing it registers the backend

from lora_megatron.parallel.groups import Layout


@contextmanager
def fake_world(layout: Layout, *, stage: int = 0, tensor_rank: int = 0) -> Iterator[None]:
    """Be tensor rank `tensor_rank` of pipeline stage `stage` of one copy of the model, until the block ends.

    Data parallelism changes no tensor of a model, so the world is one replica: tensor x pipeline ranks. No device is
    touched and no random state is seeded. The process must not be in a world already.
    """
    assert not dist.is_initialized(), "a process is in one world at a time"
    rank = stage * layout.tensor * layout.context + tensor_rank  # megatron-core's order: tensor, context, data, pipe
    dist.init_process_group("fake", rank=rank, world_size=layout.model_size, store=FakeStore())
    try:
        mpu.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
            context_parallel_size=layout.context,
            create_gloo_process_groups=False,
        )
        yield
    finally:
        mpu.destroy_model_parallel()
        dist.destroy_process_group()
