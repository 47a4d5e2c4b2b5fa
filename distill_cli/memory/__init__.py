"""Predict the memory of a rank from the models' config.json and safetensors headers. No torch.

The trainer's peak is the largest of the moments of an optimizer update, each a sum of parts (`trainer_moments`). With c
bytes per computed element (2 in bf16, 4 in fp32), s ranks that share the parameters (shard x context) and P parameters
of this rank's tensor-parallel share, of them P_layer in a layer and P_root in embedding, last norm and head (of a
multimodal model only the text model's):

- weights: 4 P / s, and the head of each teacher that returns hidden states, of its own dtype, / s.
- optimizer: AdamW's two moments, 8 P / s. With `train.offload_optimizer` only inside its own update, on GPUs.
- gradients: 4 P / s as layers are done; in addition the whole ones of the layer at work, and the float32 copy that is
  reduced. With several micro-batches per update 4 P more: FSDP reduces the last one's, with the sum of the others.
- gathered: c P_root from the forward pass into the end of the backward pass, c P_layer of the layer at work, and as
  much of the layer that is fetched meanwhile. One rank alone gathers too: its computed copies.
- activations: what `train.activation_checkpointing` keeps of every layer, and in the backward pass one layer whole.
  A layer's widths are read from its matrices, not from its family's name (`layers.read_layer`).
- loss: the head's weight gradient in float32, the chunks' buffers, one more for a soft cap of the logits and one for a
  teacher's, the teachers' heads where they are gathered, and the head's results for each token.

With adapters, gradients and optimizer cover their parameters alone, the frozen weights are c P / s, and neither a
norm's normalised input nor the head's gradient is kept.

Experts count whole in weights, gradients, optimizer and gathered, where `mesh.expert` leaves a rank its share of them;
in activations those count that the router chooses, as if it gave every rank as many tokens.

Approximate, within 7% of measured activations and 5% of measured peaks of the families in tests/memory: the factors
for activation functions, MLA's latents, gated attention, and layers with state (short convolutions, the gated delta
rule, Mamba 2), for which transformers' own code is assumed. Kernels of flash-linear-attention and mamba-ssm keep less.
Other layers with state have no prediction. Scores that attention caps, or adds a sink to, exist on CPUs alone.

`train.cpu_offload` takes weights, optimizer and reduced gradients off a GPU. Lengths are the greatest possible: rows as
full as `train.micro_batch_tokens` and the global batch allow, every token of them a response. Padding to length buckets
may add a quarter to a sequence that is longer than a micro-batch; `train.compile` keeps less than predicted. Memory
that no key changes is left out: libraries, the CUDA context, communication buffers, fragmentation.

An engine on a GPU holds `gpu_memory_utilization` of it, or its weights and `kv_cache_gib` if that is set; on a CPU its
weights and its KV cache. Engines that stay awake add to the trainer's peak. A rank's peak is the larger of

    trainer's peak + engines that do not sleep        (training)
    weights + optimizer + all engines                 (sampling and scoring)
"""

from distill_cli.memory.engine_bytes import engine_bytes, engine_problems, engine_weights, gib
from distill_cli.memory.shape import NoPrediction, read_shape
from distill_cli.memory.verdict import Device, predict, problem

__all__ = [
    "Device",
    "NoPrediction",
    "engine_bytes",
    "engine_problems",
    "engine_weights",
    "gib",
    "predict",
    "problem",
    "read_shape",
]
