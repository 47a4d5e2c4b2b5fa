"""What a rank will hold in memory, predicted from the models' config.json and safetensors headers. No torch.

The trainer's peak is the largest of the moments of an optimizer step, each a sum of parts (`trainer_moments`). With c
bytes to a computed element (2 in bf16, 4 in fp32), s ranks that share the parameters (shard x context) and P parameters
of this rank's tensor-parallel share, of them P_layer in a layer and P_root in embedding, last norm and head:

- weights: 4 P / s.
- optimizer: AdamW's two moments, 8 P / s. With `train.offload_optimizer` only inside its own step, on GPUs.
- gradients: 4 P / s as layers are done; besides, whole ones of the layer at work, and the float32 copy that is reduced.
  Where several micro-batches make an optimizer step 4 P more: FSDP reduces the last one's, with the sum of the others.
- gathered: c P_root from the forward pass into the end of the backward pass, c P_layer of the layer at work, and as
  much of the one that is fetched meanwhile. One rank alone gathers too: its computed copies.
- activations: what `train.activation_checkpointing` keeps of every layer, and in the backward pass one layer whole.
- loss: the head's weight gradient in float32, the chunks' buffers, and what the head says of each token.

Where adapters are trained, gradients and optimizer are of their parameters alone, the frozen weights are c P / s, and
neither a norm's normalised input nor the head's gradient is kept.

`train.cpu_offload` takes weights, optimizer and reduced gradients off a GPU. Lengths are taken at their most: rows as
full as `train.micro_batch_tokens` and the global batch allow, every token of them a response. Padding to length buckets
may add a quarter to a sequence that is longer than a micro-batch; `train.compile` keeps less than is said here. Left
out is what no key changes: libraries, the CUDA context, communication buffers, fragmentation.

An engine holds on a GPU `gpu_memory_utilization` of it, or its weights and `kv_cache_gib` where that is given; on a CPU
its weights and its KV cache. Engines that stay awake add to the trainer's peak. A rank's peak is the larger of

    trainer's peak + engines that do not sleep        (it trains)
    weights + optimizer + all engines                 (they sample and score)
"""

from __future__ import annotations

from distill_cli.memory.engine_bytes import CPU_KV_CACHE_GIB, engine_bytes, engine_problems, engine_weights, gib
from distill_cli.memory.shape import ModelShape, NoPrediction, read_shape, shape_of, with_adapters
from distill_cli.memory.trainer_bytes import HEAD_BUFFER_BYTES, PARTS, Moment, Step, head_chunk, trainer_moments
from distill_cli.memory.verdict import Device, Prediction, alternatives, predict, problem

__all__ = [
    "CPU_KV_CACHE_GIB",
    "HEAD_BUFFER_BYTES",
    "PARTS",
    "Device",
    "ModelShape",
    "Moment",
    "NoPrediction",
    "Prediction",
    "Step",
    "alternatives",
    "engine_bytes",
    "engine_problems",
    "engine_weights",
    "gib",
    "head_chunk",
    "predict",
    "problem",
    "read_shape",
    "shape_of",
    "trainer_moments",
    "with_adapters",
]
