"""What is replaced and called in vLLM for a teacher's hidden states, and for its head, which makes logits of them.

A request marked with `HIDDEN` and `cpu_sampling.SCORE_FROM` returns, in place of the prompt's log-probabilities, the
hidden states that its head would have read: of the tokens before each scored one. No logits are computed for them.

Declared and checked like `vllm_patches`, which puts it in place. Importing this module imports neither vLLM nor torch.

Shape letters: R scored tokens of a prompt, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distill_cli.engines.cpu_sampling import SCORE_FROM
from distill_cli.engines.reach import reaches
from distill_cli.types import ModelHead

if TYPE_CHECKING:
    import torch

HIDDEN = {"distill_hidden": True}
"""`SamplingParams.extra_args` of a request that returns hidden states."""
V1_RUNNER, V2_WORKER = "vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.sample.prompt_logprob"
PROBES = 16
"""Hidden states by which a head that was read is compared with the model."""


def wants_hidden(sampling_params: Any) -> bool:
    """Whether a request returns hidden states."""
    return HIDDEN.items() <= (sampling_params.extra_args or {}).items()


@reaches(V1_RUNNER, "GPUModelRunner._get_prompt_logprobs_dict", replaced=True)
@reaches("vllm.v1.outputs", "LogprobsTensors")
def return_hidden_states(score_prompts: Any) -> Any:
    """Let marked requests return hidden states, in vLLM's first model runner, which CPUs have.

    Symptom: hidden states come from a pooling engine alone, which cannot score or sample.
    No longer needed when: a request of a generating engine can return its prompt's hidden states.
    """

    def score(self: Any, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]) -> dict[str, Any]:
        waiting = dict(self.num_prompt_logprobs)
        marked = [one for one in waiting if wants_hidden(self.requests[one].sampling_params)]
        if not marked:
            return score_prompts(self, hidden_states, num_scheduled_tokens)
        for request_id in marked:
            del self.num_prompt_logprobs[request_id]
        found = score_prompts(self, hidden_states, num_scheduled_tokens) if self.num_prompt_logprobs else {}
        begins = self.query_start_loc.np
        for request_id in marked:
            request, num_new = self.requests[request_id], num_scheduled_tokens.get(request_id, 0)
            if not hasattr(request, "distill_rows"):
                request.distill_rows = Rows(request.sampling_params, num_prompt=len(request.prompt_token_ids))
            begin = int(begins[self.input_batch.req_id_to_index[request_id]])
            rows = request.distill_rows
            if rows.add(hidden_states[begin : begin + num_new], computed=request.num_computed_tokens):
                found[request_id] = rows.as_logprobs(on_cpu=True)
            else:  # the prompt goes on
                self.num_prompt_logprobs[request_id] = waiting[request_id]
        return found

    return score


@reaches(V2_WORKER, "PromptLogprobsWorker.add_request", only="cuda", replaced=True, optional=True)
def mark_request(add: Any) -> Any:
    """Note the requests of vLLM's second model runner that return hidden states; see `return_hidden_states`."""

    def add_marked(self: Any, req_id: str, req_idx: int, sampling_params: Any) -> None:
        add(self, req_id, req_idx, sampling_params)
        rows = self.__dict__.setdefault("distill_rows", {})
        rows.pop(req_id, None)
        if wants_hidden(sampling_params):
            rows[req_id] = sampling_params
            self.uses_prompt_logprobs[req_idx] = False  # no logits are computed for it

    return add_marked


@reaches(V2_WORKER, "PromptLogprobsWorker.compute_prompt_logprobs", only="cuda", replaced=True, optional=True)
def return_hidden_states_v2(compute: Any) -> Any:
    """The same as `return_hidden_states` in vLLM's second model runner, which GPUs have."""

    def compute_or_return(
        self: Any,
        logits_fn: Any,
        hidden_states: torch.Tensor,
        input_batch: Any,
        all_token_ids: Any,
        num_computed_tokens: Any,
        prompt_lens: Any,
    ) -> dict[str, Any]:
        found = compute(self, logits_fn, hidden_states, input_batch, all_token_ids, num_computed_tokens, prompt_lens)
        marked = self.__dict__.get("distill_rows", {})
        for index, request_id in enumerate(input_batch.req_ids if marked else ()):
            rows = marked.get(request_id)
            if rows is None:
                continue
            if not isinstance(rows, Rows):
                num_prompt = int(prompt_lens[input_batch.idx_mapping_np[index]])
                rows = marked[request_id] = Rows(rows, num_prompt=num_prompt)
            begin, num_new = int(input_batch.query_start_loc_np[index]), int(input_batch.num_scheduled_tokens[index])
            computed = int(input_batch.num_computed_prefill_tokens_np[index])
            if rows.add(hidden_states[begin : begin + num_new], computed=computed):
                found[request_id] = rows.as_logprobs(on_cpu=False)
                del marked[request_id]
        return found

    return compute_or_return


class Rows:
    """The hidden states of one prompt, which may be prefilled in pieces."""

    def __init__(self, sampling_params: Any, *, num_prompt: int) -> None:
        self._first, self._num_prompt = sampling_params.extra_args[SCORE_FROM], num_prompt
        self._parts: list[torch.Tensor] = []

    def add(self, hidden_nH: torch.Tensor, *, computed: int) -> bool:
        """Take the hidden states of the tokens from place `computed` on; return whether the prompt is at its end."""
        begin = max(self._first - 1 - computed, 0)  # the hidden state before a token predicts it
        end = min(self._num_prompt - 1 - computed, len(hidden_nH))
        if begin < end:
            self._parts.append(hidden_nH[begin:end].clone())
        return computed + len(hidden_nH) >= self._num_prompt

    def as_logprobs(self, *, on_cpu: bool) -> Any:
        """Return them as vLLM carries log-probabilities: in the second of three tensors."""
        import torch
        from vllm.v1.outputs import LogprobsTensors

        hidden_RH = torch.cat(self._parts)
        if on_cpu:
            hidden_RH = hidden_RH.cpu()
        none_R1 = torch.zeros(len(hidden_RH), 1, dtype=torch.int32, device=hidden_RH.device)
        return LogprobsTensors(none_R1, hidden_RH, none_R1[:, 0])


@reaches("vllm.model_executor.layers.logits_processor", "LogitsProcessor._apply_head", "LogitsProcessor._get_logits")
@reaches("vllm.distributed", "tensor_model_parallel_all_gather")
def read_head(worker: Any) -> ModelHead | str:
    """Return the head by which the engine makes logits, compared with its own logits; or why it cannot be known.

    A collective of the ranks that share the engine; all of them get the whole head. It holds no more than its logits
    would: a head whose weight is not plain is read by what it makes of unit vectors.

    Symptom: the trainer needs the head of a teacher whose files it may not have, in whatever form the engine has it.
    No longer needed when: a model's head can be had from vLLM with its scale, cap and bias.
    """
    import torch

    model, seen = worker.get_model(), list[tuple[Any, Any, Any, Any]]()

    def note(processor: Any, arguments: Any, keywords: Any) -> None:
        names = ("lm_head", "hidden_states", "embedding_bias")
        given = dict(zip(names, arguments, strict=False)) | keywords
        seen.append((processor, given["lm_head"], given["hidden_states"], given.get("embedding_bias")))

    config = worker.model_runner.model_config
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(PROBES, config.get_hidden_size(), generator=generator).to(worker.device, config.dtype)
    from distill_cli.engines.vllm_patches import logits_processors

    hooks = [one.register_forward_pre_hook(note, with_kwargs=True) for one in logits_processors(worker)]
    try:
        with torch.inference_mode():
            logits = model.compute_logits(probe)
    finally:
        for hook in hooks:
            hook.remove()
    if len(seen) != 1:
        return f"its logits come from {len(seen)} heads"
    processor, lm_head, hidden, bias = seen[0]
    if processor.logits_as_input or hidden.shape != probe.shape:
        return "its head is not that of its last hidden state"
    with torch.inference_mode():
        weight_VH = _whole_weight(processor, lm_head, num_hidden=probe.shape[1], like=probe)
        weight_VH = weight_VH[: processor.org_vocab_size]
        bias_V = None if bias is None else _whole(bias, lm_head)[: processor.org_vocab_size].clone()
        # Before the head: a scale of the hidden states. After it vLLM caps first, then scales.
        before = float((hidden.double() * probe.double()).sum() / probe.double().square().sum())
        if not torch.allclose(hidden.double(), before * probe.double(), rtol=2e-2, atol=1e-6):
            return "its head reads more than its last hidden state"
        scale, cap = processor.scale, processor.soft_cap
        head = ModelHead(
            (weight_VH * before if before != 1.0 else weight_VH).cpu(),
            None if bias_V is None else bias_V.to(weight_VH.dtype).cpu(),
            scale=float(scale),
            soft_cap=None if cap is None else float(cap * abs(scale)),
        )
        if logits is None:  # the engine's first rank has them
            return head
        made = head.logits(probe.cpu())
        error = float((made - logits[:, : made.shape[1]].double().cpu()).abs().max())
        spread = float(made.std())
    exact = config.dtype == torch.float32
    limit = (1e-4 if exact else 5e-2) * max(spread, 1e-3)
    return head if error <= limit else f"its head makes other logits than the engine, by up to {error:.2g}"


def _whole_weight(processor: Any, lm_head: Any, *, num_hidden: int, like: torch.Tensor) -> torch.Tensor:
    """Return the weight of a head over all ranks of the engine: [V, H]."""
    import torch

    weight = getattr(lm_head, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.shape[1:] == (num_hidden,):
        return _whole(weight.detach(), lm_head)
    unit = torch.eye(num_hidden, dtype=like.dtype, device=like.device)
    apply = lm_head.quant_method.apply
    return _whole(torch.cat([apply(lm_head, rows, bias=None) for rows in unit.split(256)]).t().contiguous(), lm_head)


def _whole(rows: torch.Tensor, lm_head: Any) -> torch.Tensor:
    from vllm.distributed import tensor_model_parallel_all_gather

    return tensor_model_parallel_all_gather(rows.contiguous(), dim=0) if lm_head.tp_size > 1 else rows
