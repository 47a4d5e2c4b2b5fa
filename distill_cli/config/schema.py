"""Every key: its type, default, unit and range. The defaults are those of the Qwen3 recipe on GPUs.

`conf/` chooses among them by group; `model=tiny`, the embedded default, turns down what a laptop needs turned down.
A key's meaning stands beneath it. `null` in YAML is None here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING


class Dtype(Enum):
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class Precision(Enum):
    bf16 = "bf16"
    fp32 = "fp32"


class Checkpointing(Enum):
    none = "none"
    selective = "selective"
    full = "full"


class Schedule(Enum):
    constant = "constant"
    cosine = "cosine"
    linear = "linear"


class Tail(Enum):
    bucket = "bucket"
    renormalize = "renormalize"
    zero = "zero"


class OnTruncation(Enum):
    warn = "warn"
    stop = "stop"


class OverlongPrompts(Enum):
    drop = "drop"
    truncate = "truncate"


class EosMap(Enum):
    auto = "auto"
    off = "off"


class LoraSync(Enum):
    merged = "merged"
    adapter = "adapter"


class OffPolicy(Enum):
    dataset = "dataset"
    teacher = "teacher"


class Launcher(Enum):
    local = "local"
    slurm = "slurm"


@dataclass
class LoraConfig:
    rank: int | None = None
    """Train adapters of this rank beside weights that stay as they are (LoRA, Hu et al. 2021): no gradients and no
    optimizer state for those. null or 0 trains all weights."""
    alpha: float = 32.0
    """What an adapter adds is scaled by alpha / rank. The learning rate that suits is about ten times that of training
    all weights."""
    targets: list[str] | None = None
    """The linear layers that have an adapter, by the ends of their names (q_proj, mlp.down_proj); null is every one of
    the decoder's layers. Embedding and head have none."""
    sync: LoraSync = LoraSync.merged
    """How the sampler gets them: added to its weights (merged), or as adapters of its own beside weights that never
    move (adapter): slower sampling, but in 16 bits no weight is rounded anew, as none is in the trainer."""

    @property
    def is_on(self) -> bool:
        return bool(self.rank)


@dataclass
class StudentModel:
    path: str = MISSING
    """A Hugging Face folder or hub name. `package://tiny_pair/student` is the student that ships with distill."""
    revision: str | None = None
    """Branch, tag or commit on the hub; null is the newest."""
    dtype: Dtype = Dtype.bfloat16
    """Of the sampler's weights. The trainer's own precision is `train.precision`."""
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class TeacherModel:
    path: str = MISSING
    """A Hugging Face folder or hub name; the same vocabulary as the student's."""
    revision: str | None = None
    dtype: Dtype = Dtype.bfloat16
    """Of the scorer's weights."""
    quantization: str | None = None
    """A vLLM quantization method (fp8, awq, ...); null leaves the weights as they are."""
    chat_template: str | None = None
    """What the teacher's prompt is rendered with: a Jinja file, the template itself, or `own`, the one in its folder;
    null is the student's. The answer's tokens are the student's in any case."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the template for the teacher alone, over `model.chat_template_kwargs`."""


@dataclass
class ModelConfig:
    student: StudentModel = field(default_factory=StudentModel)
    teacher: TeacherModel = field(default_factory=TeacherModel)
    tokenizer: str | None = None
    """Folder or hub name; null is the student's own."""
    chat_template: str | None = None
    """A Jinja file, or the template itself; null is the tokenizer's own."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the template, such as `enable_thinking`."""
    eos_map: EosMap = EosMap.auto
    """Where the two models end with different tokens (a Base student, an instruct teacher), auto takes these for one:
    sampling stops at any of them, and the loss compares the probability of ending. off: each token for itself."""
    trust_remote_code: bool = False
    """Run Python that a model's folder brings along. Only for models whose code you have read."""


@dataclass
class LossConfig:
    kl_type: str = "mixed"
    """forward, reverse, mixed, jsd, skew_forward, skew_reverse, or `pkg.module:function` of your own."""
    kl_weight: float = 0.5
    """Weight of the forward part, for mixed and jsd: 0..1."""
    skew: float = 0.1
    """How much of the other distribution is mixed in, for skew_forward and skew_reverse: 0..1
    (DistiLLM, Ko et al. 2024, found 0.1 best)."""
    topk: int = 64
    """Tokens of the teacher's distribution that are kept at each position: 1..vocabulary."""
    tail: Tail = Tail.bucket
    """What happens outside the top-k: one more class (bucket), both sides renormalised on the top-k (renormalize),
    or a teacher that is zero there (zero)."""
    temperature: float = 1.0
    """Divides both models' logits before the softmax: above 0."""


@dataclass
class DataConfig:
    train: dict[str, Any] = field(default_factory=dict)
    """`source` and that source's own keys; `distill ls data` lists them."""
    validation: dict[str, Any] | None = field(default_factory=dict)
    """Likewise; where it is empty or null, nothing is validated."""
    prompt_template: str = "{question}"
    """The user's message; `{question}` stands for the row's question."""
    system_prompt: str | None = None
    """What the system says first, where a conversation brings none of its own."""
    max_prompt_tokens: int | None = None
    """Tokens of a prompt, at most; null is the room that rollout.max_new_tokens leaves."""
    overlong_prompts: OverlongPrompts = OverlongPrompts.drop
    """Prompts that are longer are left out (drop), or the end of their question is (truncate); counted either way."""
    teacher_context: str | None = None
    """A column of the training data that only the teacher sees, such as a reference solution."""
    teacher_prompt_template: str = "{question}\n\nA reference solution, for you alone:\n\n{context}"
    """The teacher's user message where it has a context; `{question}` stands for what the student reads."""
    max_teacher_prompt_tokens: int | None = None
    """Tokens of the teacher's prompt, at most; null is max_prompt_tokens where it has no context, else
    rollout.max_sequence_length."""
    shuffle_buffer: int = 10_000
    """Rows that are held to shuffle a source that is streamed; others are shuffled whole."""
    shuffle: bool = True
    """A new order of the training prompts each epoch, by `train.seed`."""
    verifier: str | None = None
    """What calls an answer right: exact, math, regex, choice, or `pkg.module:function`; null where the task has no
    answers to check."""


@dataclass
class RolloutConfig:
    prompts_per_step: int = 128
    generations_per_prompt: int = 1
    max_new_tokens: int = 7168
    """Tokens of an answer, at most."""
    max_sequence_length: int = 8192
    """Tokens of prompt and answer together, at most."""
    temperature: float = 1.0
    """Of sampling; 0 is greedy."""
    top_p: float = 1.0
    top_k: int = -1
    """Sample among the k most likely tokens; -1 is all of them."""
    stop: list[str] = field(default_factory=list)
    """Strings that end an answer."""
    stop_token_ids: list[int] = field(default_factory=list)
    """Tokens that end an answer, besides the model's own end-of-sequence tokens."""
    max_truncated_rate: float = 0.9
    """Share of answers that may reach their length limit, 0..1. Above it for three steps in a row the student may be
    losing its way of ending; 1 never minds."""
    on_truncation: OnTruncation = OnTruncation.warn
    """What happens then: a warning, or a checkpoint and the end of the run."""
    on_policy_fraction: float = 1.0
    """Share of a step's sequences that the student writes, 0..1; the others are answers of `off_policy`, scored and
    trained on in the same way. 0 never asks the student: supervised or offline distillation; between, GKD's mixture."""
    off_policy: OffPolicy = OffPolicy.dataset
    """Whose answers those are: the dataset's (`response_key`), or the teacher's own, sampled as the student's are."""
    save_scores: bool = False
    """Keep each step's sequences with the teacher's top-k in the run's `scores/`, for `distill replay`: about
    8 x (loss.topk + 2) bytes a response token."""
    replay: str | None = None
    """A run that kept its scores (`save_scores`): train on what it recorded, step by step, in place of new answers. No
    engine is started, unless something is validated. `distill replay RUN` sets it."""
    environment: str | None = None
    """What answers the student between its turns: calculator, guess, or `pkg.module:function`; null where a sequence is
    one answer."""
    max_turns: int = 1
    """Turns of a sequence, at most, where there is an environment. rollout.max_new_tokens is of each,
    rollout.max_sequence_length of all of them with what the environment says."""


@dataclass
class TrainConfig:
    max_steps: int = 1000
    """Steps, each of `rollout.prompts_per_step` prompts."""
    max_epochs: int = 10
    """Passes over the training prompts, at most; whichever of the two ends first."""
    global_batch_size: int = 64
    """Sequences to an optimizer step, over all ranks; it divides prompts_per_step x generations_per_prompt."""
    micro_batch_tokens: int = 16384
    """Tokens of a forward and backward pass, at most: sequences are packed or padded up to it. Context-parallel ranks
    share them."""
    packing: bool = True
    """Sequences laid end to end, none seeing another; false pads those of similar length to the same length."""
    lr: float = 2e-5
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    warmup_steps: int = 10
    """Optimizer steps over which the learning rate rises from 0."""
    schedule: Schedule = Schedule.constant
    """After the warm-up: constant, or falling to 0 by the last optimizer step as a cosine or a line."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm where it is larger."""
    max_bad_steps: int = 3
    """Optimizer steps in a row whose loss or gradient may be not finite: each is skipped, after that many the run
    stops and leaves their rollouts in `rollouts/`."""
    precision: Precision = Precision.bf16
    """bf16: bfloat16 compute, float32 weights, reductions and loss. fp32: float32 throughout."""
    activation_checkpointing: Checkpointing = Checkpointing.full
    """What the backward pass computes again instead of keeping: each layer whole (full), all but matrix products and
    attention (selective), or nothing (none)."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer in host memory, on GPUs: slower, for what does not fit otherwise."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in host memory, on GPUs, except inside the optimizer's step: room for the engines and
    the activations, for a copy there and back each step."""
    compile: bool = False
    """Compile each layer (torch.compile): a slower start, faster steps. Not with mesh.tensor above 1. Of compiled
    layers selective checkpointing keeps attention's output alone: matrix products are computed again."""
    seed: int = 42
    """Of the order of prompts and of every sampled answer."""


@dataclass
class MeshConfig:
    """How the ranks share the work; what is left of them after these three is FSDP's and shards the parameters."""

    tensor: int = 1
    """Ranks that share each layer's matrices; it divides attention heads, their keys, the MLP and the vocabulary."""
    context: int = 1
    """Ranks that share each sequence: for sequences longer than one rank's memory."""
    sequence_parallel: bool = False
    """Tensor-parallel ranks share the tokens too, outside attention and MLP: less memory for activations."""
    replicate: int = 1
    """Copies of the sharded model (HSDP): parameters are gathered within a copy, gradients summed over all."""


@dataclass
class EngineModelConfig:
    tensor_parallel: int = 1
    """Consecutive ranks that share one engine, for a model that is too large or too slow for one; it divides the ranks
    of a node, attention heads, the MLP and the vocabulary. Student, teacher and `mesh.tensor` may each have their
    own."""
    sleep: bool | None = None
    """Give the GPU's memory back while the others work: the student's weights are dropped, the teacher's go to host
    memory. null is true on GPUs; CPUs cannot."""
    gpu_memory_utilization: float = 0.25
    """Share of a GPU's memory that the engine takes for weights and KV cache. Awake, each fits beside the trainer's
    part of the student; those that do not sleep, beside each other."""
    kv_cache_gib: float | None = None
    """Size of the KV cache; null on GPUs is what gpu_memory_utilization leaves, on CPUs 0.25 GiB."""
    max_model_len: int | None = None
    """Tokens of a sequence, at most; null is what training and validation need."""
    enforce_eager: bool = False
    """Leave out CUDA graphs and compilation: a faster start, slower sampling. CPUs always do."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `vllm.LLM`."""


@dataclass
class EngineConfig:
    student: EngineModelConfig = field(default_factory=EngineModelConfig)
    teacher: EngineModelConfig = field(default_factory=EngineModelConfig)


@dataclass
class EvalConfig:
    period: int = 20
    """Steps between validations; 0 is never."""
    at_start: bool = True
    at_end: bool = True
    teacher: bool = True
    """Measure the teacher once at the start: the share of the gap that was closed needs it."""
    max_samples: int = 512
    """Validation prompts, at most; of several datasets, of each."""
    batch_size: int = 64
    """Answers that each rank's engine is asked for at a time."""
    repeat: int = 1
    """Answers to each prompt: accuracy is the mean over them, and `distill eval` adds pass@k and majority@k. More than
    one needs a temperature above 0."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    max_new_tokens: int | None = None
    """null is rollout.max_new_tokens."""
    record_samples: int = 16
    """Prompts (the first of validation, else of training) whose sampled answers are left in `rollouts/` at the start,
    every eval.period steps and at the end, with what both models say at each token: the report shows them. 0 is
    none."""


@dataclass
class CheckpointConfig:
    enabled: bool = True
    period: int = 10
    """Steps between checkpoints. The last step has one too, and so has a run that is asked to stop."""
    keep_top_k: int = 3
    """How many are kept, the best by `metric`; the newest is kept besides. Those of steps without a value fill up."""
    metric: str = "val/accuracy"
    """Any train/, rollout/ or val/ metric of metrics.jsonl."""
    higher_is_better: bool = True
    must_save_by: str | None = None
    """DD:HH:MM:SS of wall clock since the command was typed, restarts included: before a step that may end later than
    that, the run saves a checkpoint and stops; `resume` goes on."""
    save_optimizer: bool = True
    """Without it a checkpoint is a third as large, and a resumed run is no longer exact."""
    async_save: bool = True
    """Train on while a checkpoint is written, at the cost of a copy in host memory."""


@dataclass
class ClusterConfig:
    """Where runs run. What is marked Slurm is read by launcher=slurm alone."""

    launcher: Launcher = Launcher.local
    nodes: int = 1
    """Machines of a run; more than one needs Slurm."""
    gpus_per_node: int | None = None
    """null is what is visible, or under Slurm what a node of the partition has; 0 runs on CPUs."""
    ranks_per_node: int | None = None
    """Processes of a node; null is one a GPU, or one on CPUs. On GPUs it is the number of GPUs."""
    max_restarts: int = 3
    """How often a run that failed goes on by itself from its newest checkpoint. An attempt that ends with an error
    before its first step is not repeated."""
    hang_timeout_s: float = 1800
    """Seconds that a stage of a step may take before the ranks are taken for hung and ended; 0 waits for ever."""
    grace_s: float = 60
    """Seconds that the ranks have for a checkpoint when the run is asked to stop (Ctrl-C, SIGTERM, Slurm's warning)."""
    parallel_jobs: int = 1
    """Runs of a sweep at a time, on this machine; on GPUs each takes gpus_per_node of its own."""
    partition: str | None = None
    """Slurm: where to queue; null is the cluster's default."""
    account: str | None = None
    """Slurm: who pays."""
    qos: str | None = None
    """Slurm: quality of service."""
    time: str | None = None
    """Slurm: time limit, such as 04:00:00, 2-12:00:00, or minutes; null is the partition's default."""
    cpus_per_node: int | None = None
    """Slurm: CPUs of each node; null is a node's CPUs in the share of its GPUs that is used, or one a rank on CPUs."""
    mem: str | None = None
    """Slurm: memory of each node, such as 200G; 0 is all of it; null is the cluster's default."""
    constraint: str | None = None
    """Slurm: features that nodes must have."""
    exclude: str | None = None
    """Slurm: nodes to leave out."""
    setup: list[str] = field(default_factory=list)
    """Slurm: lines of shell before the ranks start, such as `module load cuda`."""
    container: dict[str, Any] = field(default_factory=dict)
    """Slurm with pyxis: `image`, `mounts`, `workdir` and so on, each an argument --container-<name> of srun."""
    python: str | None = None
    """Slurm: the interpreter on the nodes, or in the container; null is the one that submits."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Slurm: any other parameter of sbatch, without its dashes: {reservation: mine, exclusive: true}."""
    wait: bool = False
    """Slurm: follow the job to its end and exit with its status; `--wait` is the same."""
    array_parallelism: int | None = None
    """Slurm: runs of a sweep at a time; null leaves it to the cluster."""
    max_requeues: int = 10
    """Slurm: how often a job starts again after a preemption, its time limit or the loss of a node."""
    signal_s: int = 120
    """Slurm: seconds before the time limit at which the run saves and is queued again; at least grace_s."""
    shared_folders: list[str] | None = None
    """Slurm: folders that every node sees, such as [/home, /scratch]; a run elsewhere is refused. null takes the
    file system for a sign: a disk of this machine is refused where the nodes are other machines."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables of the ranks. Not for passwords and tokens: those are inherited from your shell."""
    hf_home: str | None = None
    """Folder of models and data from the Hugging Face hub; null is the environment's HF_HOME, or its default."""
    compile_cache: str | None = None
    """Folder of what torch, Triton and vLLM compile; null is each one's default. Best on a node's own disk."""
    tmp_dir: str | None = None
    """Folder of temporary files; null is the environment's TMPDIR. In all three, $NAMES are a node's own variables."""


@dataclass
class MlflowConfig:
    enabled: bool = False
    """`tracker=mlflow`, which is the default, turns it on; `tracker=none` leaves all off."""
    uri: str | None = field(default=None, repr=False, metadata={"credentials": "MLFLOW_TRACKING_URI"})
    """Address of a tracking server or a database; null is MLFLOW_TRACKING_URI, or else `mlflow.db` in run.root.
    Credentials in it are not written down: they stay in the environment of what is started."""
    experiment: str = "distill"
    run_name: str | None = None
    """null is the run folder's name."""
    log_model: bool = False
    """Log the trained student's folder as the artifact `model` when the run has finished."""


@dataclass
class TrackerConfig:
    """Where runs are shown besides their folders; several may be on. Each is a module of `track/`."""

    mlflow: MlflowConfig = field(default_factory=MlflowConfig)


@dataclass
class RunConfig:
    root: str = "runs"
    """Where runs are kept."""
    name: str | None = None
    """The run's folder in root; null is <date>-<time>_<model>_<loss>."""
    print_every: int = 1
    """Steps between printed lines where the output is no terminal."""


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    run: RunConfig = field(default_factory=RunConfig)
