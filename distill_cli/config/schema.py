"""The keys that decide what is learned (model, data, loss, ...), and `Config`, which has all sections.

The loss's are in loss_schema.py, and those that decide how a run is executed in execution_schema.py. `null` in YAML is
None here. Defaults are those of the Qwen3 recipe on GPUs, which is NeMo RL's; the files of `conf/` choose others by
group, and `model=tiny` scales all of them to a laptop.
"""

import math
from enum import Enum
from typing import Any

from omegaconf import MISSING

from distill_cli.config import execution_schema as execution
from distill_cli.config.fields import key, section
from distill_cli.config.loss_schema import LossConfig

Dtype = Enum("Dtype", {"bfloat16": "bfloat16", "float16": "float16", "float32": "float32"})
Precision = Enum("Precision", {"bf16": "bf16", "fp32": "fp32"})
Checkpointing = Enum("Checkpointing", {"none": "none", "selective": "selective", "full": "full"})
Schedule = Enum("Schedule", {"constant": "constant", "cosine": "cosine", "linear": "linear"})
OnTruncation = Enum("OnTruncation", {"warn": "warn", "stop": "stop"})
OverlongPrompts = Enum("OverlongPrompts", {"drop": "drop", "truncate": "truncate"})
EosMap = Enum("EosMap", {"auto": "auto", "off": "off"})
TeacherTokenizer = Enum("TeacherTokenizer", {"student": "student", "own": "own"})
LoraSync = Enum("LoraSync", {"merged": "merged", "adapter": "adapter"})
STUDENT = "student"
"""`model.teacher.path` of a teacher that is the student; `./student` is a folder of that name."""
HIDDEN = "hidden"
"""`rollout.save_scores` of a run that keeps hidden states."""
OffPolicy = Enum("OffPolicy", {"dataset": "dataset", "teacher": "teacher"})


@section
class LoraConfig:
    rank: int | None = key(None, at_least=0)
    """Train low-rank adapters of this rank and freeze all other weights, which need no gradients and no optimizer state
    (LoRA, Hu et al. 2021). null or 0 trains all weights."""
    alpha: float = key(32.0, above=0, only_with="model.student.lora.rank")
    """The output of an adapter is scaled by alpha / rank. Adapters usually want about ten times the learning rate of
    full training."""
    targets: list[str] | None = None
    """The linear layers that get an adapter, by the ends of their names (q_proj, mlp.down_proj); null is every linear
    layer of the decoder. Embedding and head have none."""
    sync: LoraSync = key(LoraSync.merged, resume=True, only_with="model.student.lora.rank")
    """How the sampler gets the adapters. merged: added to its weights. adapter: as adapters, with weights that never
    change; sampling is slower, but 16-bit weights are not rounded again, as in the trainer."""

    @property
    def is_on(self) -> bool:
        return bool(self.rank)

    @property
    def syncs_adapter(self) -> bool:
        return self.is_on and self.sync is LoraSync.adapter


@section
class StudentModel:
    path: str = key(MISSING, evaluation=True)
    """A Hugging Face folder or hub name. `package://tiny_pair/student` is the student that ships with distill."""
    revision: str | None = key(None, evaluation=True)
    """Branch, tag or commit on the hub; null is the newest."""
    dtype: Dtype = key(Dtype.bfloat16, evaluation=True)
    """Type of the sampler's weights. The trainer's own precision is `train.precision`."""
    lora: LoraConfig = key(factory=LoraConfig)


@section
class TeacherModel:
    path: str | None = key(None, evaluation=True)
    """A Hugging Face folder or hub name. Its vocabulary must be the student's, unless tokenizer=own. `student` is the
    student itself, as it is at each step (self-distillation): give it a context or a template of its own, `ema` or
    `refresh`. With the `url` of a vLLM server only its config and tokenizer are read."""
    ema: float | None = key(None, at_least=0, below=1)
    """The teacher's weights are a running mean of the student's: after each training step ema x teacher + (1 - ema) x
    student. For path=student."""
    refresh: int = key(1, at_least=1)
    """The teacher's weights are the student's of the last step that this number divides. For path=student."""
    url: Any = key(None, resume=True)
    """Address of a server that has the teacher, or a list of addresses of several that share the work; null is an
    engine in this job. `engine.teacher` then has no effect. The server is a scoring server (`distill serve`), for which
    `path` has no effect either, or vLLM's (`vllm serve MODEL --max-logprobs K` with K of at least loss.topk). That is
    slower, and scores only at loss.temperature=1, over its whole vocabulary, and sequences shorter than its
    --max-model-len. The token of either is DISTILL_SERVER_TOKEN in the environment; for vLLM's --api-key VLLM_API_KEY
    will do."""
    nodes: int = key(0, at_least=0, resume=True)
    """Serve the teacher by a job of its own on so many nodes, each with engines of all its GPUs that share the work; 0
    is an engine in this job. The run submits that job, waits for it and ends it. Needs a launcher that submits jobs
    (cluster=slurm); `cluster.slurm.teacher` has the job's own settings."""
    certificate: str | None = key(None, resume=True, only_with="model.teacher.url")
    """A file with the certificate (PEM) to trust at an https:// address, such as a self-signed one; null is the
    system's."""
    patience_s: float = key(600.0, above=0, resume=True, only_with="model.teacher.url or model.teacher.nodes")
    """Seconds without an answer of any server after which the run saves and stops. `distill resume` goes on. With
    `nodes` the run starts again by itself, at most cluster.max_restarts times."""
    revision: str | None = key(None, evaluation=True)
    """Branch, tag or commit on the hub; null is the newest."""
    dtype: Dtype = key(Dtype.bfloat16, evaluation=True)
    """Type of the scorer's weights."""
    quantization: str | None = key(None, evaluation=True)
    """A vLLM quantization method (fp8, awq, ...); null leaves the weights as they are."""
    tokenizer: TeacherTokenizer = TeacherTokenizer.student
    """student: the teacher reads the student's tokens. own: it has a tokenizer of its own, reads what the student wrote
    as text in its own tokens and its prompts in its own chat template; its distributions are brought to the student's
    tokens by their bytes (docs/cross_tokenizer.md)."""
    chat_template: str | None = None
    """The template of the teacher's prompt: a Jinja file, the template itself, or `own` for the one in the teacher's
    folder; null is the student's, or its own with tokenizer=own. The answer's text is the student's in any case."""
    chat_template_kwargs: dict[str, Any] = key(factory=dict)
    """Arguments of the template for the teacher alone; they override `model.chat_template_kwargs`."""

    @property
    def is_student(self) -> bool:
        """Whether it is the student itself, now or earlier; it has no engine of its own."""
        return self.path == STUDENT and self.url is None

    @property
    def moves_apart(self) -> bool:
        """Whether its weights are the student's of earlier steps."""
        return self.is_student and (self.ema is not None or self.refresh > 1)

    @property
    def has_own_tokenizer(self) -> bool:
        """Whether it reads other tokens than the student's."""
        return self.tokenizer is TeacherTokenizer.own

    @property
    def has_files(self) -> bool:
        """Whether the run serves it from files of its own, in this job or another."""
        return not self.addresses and not self.is_student

    @property
    def has_job(self) -> bool:
        """Whether a job of its own serves it."""
        return self.has_files and self.nodes > 0

    @property
    def is_served(self) -> bool:
        """Whether servers score with it: those of its job, or those at its addresses."""
        return self.has_job or bool(self.addresses)

    @property
    def has_engine(self) -> bool:
        """Whether an engine of its own is in the job."""
        return self.has_files and not self.has_job

    @property
    def addresses(self) -> list[str]:
        """Its servers, without a slash at the end; empty if no `url` is given."""
        urls = [] if self.url is None else [self.url] if isinstance(self.url, str) else self.url
        return [str(url).rstrip("/") for url in urls]

    @property
    def shown(self) -> str:
        """Its addresses, or its path, with the revision if one is given."""
        if self.addresses:
            return ", ".join(self.addresses)
        return f"{self.path}@{self.revision}" if self.revision else str(self.path)


@section
class ModelConfig:
    student: StudentModel = key(factory=StudentModel, replay=True)
    teacher: TeacherModel = key(factory=TeacherModel)
    teachers: dict[str, Any] = key(
        factory=dict, entries={"": "model.teacher", "loss": "loss", "engine": "engine.teacher", "data": "data"}
    )
    """Several teachers by name, each with the keys of `model.teacher`, and its own `loss`, `engine` (as engine.teacher)
    and `data` (teacher_prompt_template, teacher_context=null). What a teacher does not set is that of the run:
    `model.teachers.math.path=...` `model.teachers.code.loss.kl_type=reverse`. `data.teacher_key` says whose a row
    is."""
    tokenizer: str | None = key(None, evaluation=True)
    """Folder or hub name of the tokenizer; null is the student's own."""
    chat_template: str | None = key(None, evaluation=True)
    """The template of the prompts: a Jinja file, or the template itself; null is the tokenizer's own."""
    chat_template_kwargs: dict[str, Any] = key(factory=dict, evaluation=True)
    """Arguments of the template, such as `enable_thinking`."""
    eos_map: EosMap = EosMap.auto
    """If the two models end with different tokens (a Base student, an instruct teacher), auto merges those tokens:
    sampling stops at any of them, and the loss compares the total probability of ending. off keeps them apart."""
    trust_remote_code: bool = key(False, replay=True, evaluation=True)
    """Run the Python code in a model's folder. Only for models whose code you have read."""


@section
class DataConfig:
    train: dict[str, Any] = key(factory=dict)
    """Training data: `source` and the keys of that source, which `distill ls data` lists."""
    validation: dict[str, Any] | None = key(factory=dict, replay=True, evaluation=True)
    """Validation data, in the same form. Empty or null turns validation off."""
    prompt_template: str = key("{question}", evaluation=True)
    """The user's message; `{question}` stands for the row's question."""
    system_prompt: str | None = key(None, evaluation=True)
    """The system message of conversations that bring none of their own."""
    max_prompt_tokens: int | None = key(None, at_least=1, evaluation=True)
    """Greatest length of a prompt in tokens; null is rollout.max_sequence_length - rollout.max_new_tokens."""
    overlong_prompts: OverlongPrompts = key(OverlongPrompts.drop, evaluation=True)
    """Prompts above that length: drop leaves them out, truncate cuts the end of the question. Both are counted."""
    teacher_key: str | None = key(None, only_with="model.teachers")
    """The column of the data that says whose a row is, if there are several teachers (`model.teachers`): a name, or for
    a mixture of their distributions a list of names or an object of names and weights. null is the name of the row's
    source (`data=mix`)."""
    teacher_context: str | None = None
    """A column of the training data that only the teacher sees, such as a reference solution."""
    teacher_prompt_template: str = key(
        "{question}\n\nA reference solution, for you alone:\n\n{context}", only_with="data.teacher_context"
    )
    """The teacher's user message if it has a context; `{question}` stands for what the student reads."""
    max_teacher_prompt_tokens: int | None = key(None, at_least=1)
    """Greatest length of the teacher's prompt in tokens; null is rollout.max_sequence_length if it has a context, else
    data.max_prompt_tokens."""
    shuffle_buffer: int = key(10_000, at_least=1)
    """Rows held in memory to shuffle a streamed source; other sources are shuffled whole."""
    shuffle: bool = True
    """Draw a new order of the training prompts each epoch, from `train.seed`."""
    verifier: str | None = key(None, replay=True, evaluation=True)
    """What judges whether an answer is right: exact, math, regex, choice, or `pkg.module:function`; null if the task
    has no answers to check."""


@section
class RolloutConfig:
    prompts_per_step: int = key(128, at_least=1)
    """Prompts per training step, over all ranks."""
    generations_per_prompt: int = key(1, at_least=1)
    """Answers sampled for each prompt. Each is a sequence of its own in the loss."""
    max_new_tokens: Any = key(7168, schedule=True, replay=True, evaluation=True)
    """Greatest length of an answer in tokens. As a schedule, by numbers of steps: `{0: 256, 100: 1024, 300: 7168}` is
    256 tokens at first, 1024 after 100 steps and 7168 after 300; what else depends on it follows from the greatest."""
    max_sequence_length: int = key(8192, replay=True, evaluation=True)
    """Greatest length of prompt and answer together in tokens."""
    temperature: float = key(1.0, at_least=0, at_most=2)
    """Sampling temperature; 0 is greedy. At 1 the answers follow the student's own distribution."""
    top_p: float = key(1.0, above=0, at_most=1)
    """Sample among the likeliest tokens that together have this probability (nucleus sampling); 1 is all of them."""
    top_k: int = key(-1, at_least=-1)
    """Sample among the k likeliest tokens, 1 or more; -1 is all of them."""
    stop: list[str] = key(factory=list, evaluation=True)
    """Strings that end an answer."""
    stop_token_ids: list[int] = key(factory=list, evaluation=True)
    """Tokens that end an answer, in addition to the model's own end-of-sequence tokens."""
    max_truncated_rate: float = key(0.9, at_least=0, at_most=1, resume=True, replay=True)
    """Warn (or stop) if more than this share of answers reaches the length limit three steps in a row: a student that
    stops emitting end-of-sequence tokens trains on noise. 1 disables the check."""
    on_truncation: OnTruncation = key(OnTruncation.warn, resume=True, replay=True)
    """What happens above max_truncated_rate: a warning, or a checkpoint and the end of the run."""
    max_engine_mismatch: float | None = key(None, above=0, resume=True)
    """End the run if `rollout/engine_mismatch` exceeds this (nats): the sampler then writes another model's answers.
    null is 1e-3 if sampler and trainer both compute in float32, else 0.1."""
    on_policy_fraction: float = key(1.0, at_least=0, at_most=1)
    """Share of a step's sequences that the student samples; the others are answers of `off_policy`, scored and trained
    on in the same way. 0 is supervised or offline distillation; between 0 and 1 is GKD's mixture."""
    off_policy: OffPolicy = OffPolicy.dataset
    """Source of the off-policy answers: the dataset's (`response_key`), or the teacher's, sampled as the student's."""
    guard_above: float | None = key(None, above=0, below=1, resume=True)
    """Length guard: after a step in which more than this share of the student's answers reached the length limit, the
    teacher writes a share of them instead (`guard_share`), so that the student keeps ending its own. null is no
    guard."""
    guard_share: float = key(0.5, above=0, below=1, resume=True, only_with="rollout.guard_above")
    """Share of the student's answers that the teacher writes while the guard is on."""
    guard_steps: int = key(20, at_least=1, resume=True, only_with="rollout.guard_above")
    """Steps over which that share falls to 0, in equal parts, once no more than guard_above reach the limit."""
    carry_over: bool = False
    """Write tokens_per_step tokens in each step, and go on with unfinished answers in the next one: no engine waits for
    the longest answer. A step has prompts_per_step x generations_per_prompt slots; each writes an equal share, and
    begins another answer at once when one ends. train.max_steps alone ends the run."""
    tokens_per_step: int | None = key(None, at_least=1, only_with="rollout.carry_over")
    """Tokens that the student writes in a step, over all slots; null is a quarter of max_new_tokens for each slot. More
    of them ask for less reading of what earlier steps wrote, and train on it later."""
    max_age: int | None = key(None, at_least=1, only_with="rollout.carry_over")
    """Steps in which an answer may be written, at most; then it is dropped, and counted. null: any number."""
    staleness: int = key(0, at_least=0)
    """Steps between sampling and training: a step trains on answers that the student wrote with the weights of so many
    steps before. 0 is on-policy."""
    score_while_sampling: bool | None = key(None, resume=True)
    """Let the teacher score an answer when it ends, in a process of its own, while the student still writes others. It
    must stay awake, and each engine have one rank. null: on GPUs if engine.teacher.sleep=false, on CPUs not."""
    save_scores: Any = key(False, resume=True, replay=True)
    """Keep each step's sequences with the teacher's scores in the run's `scores/`, for `distill replay`. true keeps the
    top-k: about 8 x (loss.topk + 2) bytes per response token. `hidden` keeps the teacher's hidden states, in the type
    of its engine, and its head once: a replay may then have any loss.support, topk and temperature."""
    replay: str | None = key(None, replay=True)
    """A run that kept its scores (`save_scores`): train on its recorded steps instead of new answers. No engine is
    started unless the run validates. `distill replay RUN` sets it."""
    replay_shuffle: bool = key(False, replay=True, only_with="rollout.replay")
    """Draw the order of the recorded steps from `train.seed`, anew for each pass over them. The last one stays last:
    runs of all seeds end on the same sequences. A sweep of replays over `train.seed` sets it, since the seed changes
    nothing else in a replay, apart from new adapters (LoRA) and sampled validation."""
    environment: str | None = key(None, evaluation=True)
    """What answers the student between its turns: calculator, guess, or `pkg.module:function`; null if a sequence is
    one answer."""
    max_turns: int = key(1, at_least=1, evaluation=True)
    """Turns of a sequence, at most, if there is an environment. rollout.max_new_tokens then limits each turn, and
    rollout.max_sequence_length all turns together with the environment's messages."""

    @property
    def length_schedule(self) -> dict[int, int]:
        """Greatest lengths of an answer, by the number of steps after which they hold."""
        return self.max_new_tokens if isinstance(self.max_new_tokens, dict) else {0: self.max_new_tokens}

    def max_new_tokens_at(self, step: int) -> int:
        """Return the greatest length of an answer that is sampled in a step, counted from 1."""
        return self.length_schedule[max(after for after in self.length_schedule if after < step)]

    @property
    def longest_answer(self) -> int:
        """The greatest length of an answer in the whole run."""
        return max(self.length_schedule.values())

    @property
    def num_sequences(self) -> int:
        """Sequences of a step, or its slots."""
        return self.prompts_per_step * self.generations_per_prompt

    @property
    def token_budget(self) -> int:
        """`tokens_per_step`, or its default."""
        return self.tokens_per_step or self.num_sequences * math.ceil(self.longest_answer / 4)

    @property
    def saves_hidden(self) -> bool:
        """Whether hidden states are kept."""
        return bool(self.save_scores == HIDDEN)


@section
class TrainConfig:
    max_steps: int = key(1000, at_least=1, resume=True)
    """Training steps, each of `rollout.prompts_per_step` prompts."""
    max_epochs: int = key(10, at_least=1, resume=True)
    """Passes over the training prompts, at most; the run ends at the first of the two limits."""
    global_batch_size: int = key(64, at_least=1)
    """Sequences per optimizer update, over all ranks; it must divide prompts_per_step x generations_per_prompt."""
    router_aux_loss: float = key(0.0, at_least=0)
    """Weight of the loss by which a family with experts balances them, as its own code computes it over the tokens of a
    micro-batch; 0 is off: the sampler's router is the student's own."""
    micro_batch_tokens: int = key(16384, resume=True)
    """Tokens per forward and backward pass, at most: sequences are packed or padded up to it. Context-parallel ranks
    share them. It must hold one sequence of rollout.max_sequence_length."""
    packing: bool = key(True, resume=True)
    """Lay sequences end to end, each attending to itself alone; false pads sequences of similar length to the same.
    Layers that carry state (Mamba, linear attention, convolutions) would carry it from one sequence into the next: for
    a student that has some it is always false."""
    lr: float = key(2e-5, above=0)
    """AdamW's learning rate after the warm-up."""
    weight_decay: float = key(0.01, at_least=0)
    """AdamW's decoupled weight decay: each update shrinks the weights by lr x weight_decay."""
    betas: list[float] = key(factory=lambda: [0.9, 0.999])
    """AdamW's decay rates of the gradient's running mean and of its square's, each from 0 to below 1."""
    eps: float = key(1e-8, above=0)
    """Added to AdamW's denominator, against division by zero."""
    warmup_updates: int = key(10, at_least=0)
    """Optimizer updates over which the learning rate rises from 0. A step has one for each global batch."""
    schedule: Schedule = Schedule.constant
    """Learning rate after the warm-up: constant, or falling to 0 at the last optimizer update (cosine, linear)."""
    max_grad_norm: float = key(1.0, above=0)
    """A larger gradient is scaled down to this L2 norm, taken over all parameters."""
    max_bad_updates: int = key(3, at_least=1, resume=True)
    """Optimizer updates in a row with a loss or gradient that is not finite. Each is skipped; after this many the run
    stops and leaves the last one's rollouts in `rollouts/`."""
    precision: Precision = Precision.bf16
    """bf16: bfloat16 compute; float32 weights, reductions and loss. fp32: float32 throughout."""
    activation_checkpointing: Checkpointing = key(Checkpointing.full, resume=True)
    """What the backward pass recomputes instead of keeping: each layer whole (full), all but matrix products and
    attention (selective), or nothing (none)."""
    cpu_offload: bool = key(False, resume=True)
    """Keep parameters, gradients and optimizer state in host memory, on GPUs: slower, for models that do not fit
    otherwise."""
    offload_optimizer: bool = key(False, resume=True)
    """Keep the optimizer state in host memory, on GPUs, except inside the optimizer update. It leaves room for engines
    and activations, and costs a copy in both directions each step."""
    compile: bool = key(False, resume=True)
    """Compile each layer (torch.compile): a slower start, faster steps. Not with mesh.tensor above 1. With selective
    checkpointing, compiled layers keep attention's output alone and recompute matrix products."""
    seed: int = key(42, at_least=0, below=2**32, evaluation=True)
    """Seed of the order of prompts and of every sampled answer. vLLM's seeds have 32 bits."""


@section
class MeshConfig:
    """How the ranks share the work. The ranks that these axes leave are FSDP's, and shard the parameters."""

    tensor: int = key(1, at_least=1)
    """Ranks that share each layer's matrices; it must divide attention heads, key-value heads, the MLP and the
    vocabulary."""
    context: int = key(1, at_least=1)
    """Ranks that share each sequence: for sequences longer than one rank's memory."""
    sequence_parallel: bool = False
    """Tensor-parallel ranks share the tokens too, outside attention and MLP: less memory for activations."""
    expert: int = key(1, at_least=1)
    """Ranks that share each layer's experts and exchange tokens, for students with experts; a part of FSDP's ranks. It
    must divide the number of experts."""
    replicate: int = key(1, at_least=1)
    """Copies of the sharded model (HSDP): parameters are gathered within a copy, gradients summed over all."""


@section
class EvalConfig:
    period: int = key(20, at_least=0)
    """Steps between validations; 0 is never."""
    at_start: bool = True
    """Validate before the first step: the baseline of the share of the gap to the teacher that was closed."""
    at_end: bool = True
    """Validate after the last step."""
    teacher: bool = True
    """Measure the teacher once at the start: the share of the gap that was closed needs it."""
    max_samples: int = key(512, at_least=1, evaluation=True)
    """Validation prompts, at most; with several datasets, of each."""
    batch_size: int = key(64, at_least=1, evaluation=True)
    """Answers that each rank's engine samples at a time."""
    repeat: int = key(1, at_least=1, evaluation=True)
    """Answers to each prompt. Accuracy is their mean, and `distill eval` adds pass@k and majority@k. More than one
    needs a temperature above 0."""
    temperature: float = key(0.0, at_least=0, at_most=2, evaluation=True)
    """Sampling temperature of validation; 0 is greedy."""
    top_p: float = key(1.0, above=0, at_most=1, evaluation=True)
    """Nucleus sampling in validation, as rollout.top_p; it has no effect on greedy answers."""
    max_new_tokens: int | None = key(None, at_least=1, evaluation=True)
    """Greatest length of an answer in validation, in tokens; null is rollout.max_new_tokens."""
    record_samples: int = key(16, at_least=0)
    """Prompts (the first of validation, else of training) that are answered and recorded in `rollouts/` at the start,
    every eval.period steps and at the end, with both models' log-probabilities of each token, for the report; 0 is
    none."""


@section
class Config:
    model: ModelConfig = key(factory=ModelConfig)
    loss: LossConfig = key(factory=LossConfig, replay=True)
    data: DataConfig = key(factory=DataConfig)
    rollout: RolloutConfig = key(factory=RolloutConfig)
    train: TrainConfig = key(factory=TrainConfig, replay=True)
    mesh: MeshConfig = key(factory=MeshConfig, resume=True, replay=True)
    engine: execution.EngineConfig = key(factory=execution.EngineConfig, resume=True, replay=True)
    eval: EvalConfig = key(factory=EvalConfig, resume=True, replay=True)
    checkpoint: execution.CheckpointConfig = key(factory=execution.CheckpointConfig, resume=True, replay=True)
    cluster: execution.ClusterConfig = key(factory=execution.ClusterConfig, resume=True, replay=True)
    tracker: execution.TrackerConfig = key(factory=execution.TrackerConfig, resume=True, replay=True)
    search: execution.SearchConfig = key(factory=execution.SearchConfig)
    run: execution.RunConfig = key(factory=execution.RunConfig, replay=True)
