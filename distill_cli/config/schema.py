"""Every key: its type, default, unit and range. The defaults are those of the Qwen3 recipe on GPUs.

`conf/` chooses among them by group; `model=tiny`, the embedded default, turns down what a laptop needs turned down.
A key's meaning stands beneath it. `null` in YAML is None here.
"""

from __future__ import annotations

from dataclasses import field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from distill_cli.config.fields import key, section
from distill_cli.losses.divergence import DIVERGENCES, PARAMETERS, parameters_of
from distill_cli.metrics import find


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


class SearchSampler(Enum):
    tpe = "tpe"
    random = "random"


@section
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
    sync: LoraSync = key(LoraSync.merged, resume=True)
    """How the sampler gets them: added to its weights (merged), or as adapters of its own beside weights that never
    move (adapter): slower sampling, but in 16 bits no weight is rounded anew, as none is in the trainer."""

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
    """Of the sampler's weights. The trainer's own precision is `train.precision`."""
    lora: LoraConfig = field(default_factory=LoraConfig)


@section
class TeacherModel:
    path: str = key(MISSING, evaluation=True)
    """A Hugging Face folder or hub name; the same vocabulary as the student's."""
    revision: str | None = key(None, evaluation=True)
    dtype: Dtype = key(Dtype.bfloat16, evaluation=True)
    """Of the scorer's weights."""
    quantization: str | None = key(None, evaluation=True)
    """A vLLM quantization method (fp8, awq, ...); null leaves the weights as they are."""
    chat_template: str | None = None
    """What the teacher's prompt is rendered with: a Jinja file, the template itself, or `own`, the one in its folder;
    null is the student's. The answer's tokens are the student's in any case."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the template for the teacher alone, over `model.chat_template_kwargs`."""


@section
class ModelConfig:
    student: StudentModel = key(factory=StudentModel, replay=True)
    teacher: TeacherModel = field(default_factory=TeacherModel)
    tokenizer: str | None = key(None, evaluation=True)
    """Folder or hub name; null is the student's own."""
    chat_template: str | None = key(None, evaluation=True)
    """A Jinja file, or the template itself; null is the tokenizer's own."""
    chat_template_kwargs: dict[str, Any] = key(factory=dict, evaluation=True)
    """Arguments of the template, such as `enable_thinking`."""
    eos_map: EosMap = EosMap.auto
    """Where the two models end with different tokens (a Base student, an instruct teacher), auto takes these for one:
    sampling stops at any of them, and the loss compares the probability of ending. off: each token for itself."""
    trust_remote_code: bool = key(False, replay=True, evaluation=True)
    """Run Python that a model's folder brings along. Only for models whose code you have read."""


def with_parameters(cls: type) -> type:
    """Add a key for each parameter that a divergence has; null is the divergence's own default."""
    for name, kind in PARAMETERS.items():
        cls.__annotations__[name] = f"{kind.__name__} | None"
        setattr(cls, name, None)
    return cls


@section
@with_parameters
class LossConfig:
    """The parameters of the divergences in `losses/divergence.py` are keys too, such as `kl_weight` and `skew`."""

    kl_type: str = "mixed"
    """A divergence (`distill ls loss`), or `pkg.module:function` of your own."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of a function of your own, such as `loss.kwargs.alpha=0.3`."""
    topk: int = 64
    """Tokens of the teacher's distribution that are kept at each position: 1..vocabulary."""
    tail: Tail = Tail.bucket
    """What happens outside the top-k: one more class (bucket), both sides renormalised on the top-k (renormalize),
    or a teacher that is zero there (zero)."""
    temperature: float = 1.0
    """Divides both models' logits before the softmax: above 0."""

    @property
    def parameters(self) -> dict[str, Any]:
        """Return the keys with a value that the divergence takes; what a user's own takes besides is in `kwargs`."""
        read = parameters_of(self.kl_type) if self.kl_type in DIVERGENCES else PARAMETERS
        return {name: getattr(self, name) for name in read if getattr(self, name) is not None}


@section
class DataConfig:
    train: dict[str, Any] = field(default_factory=dict)
    """`source` and that source's own keys; `distill ls data` lists them."""
    validation: dict[str, Any] | None = key(factory=dict, replay=True, evaluation=True)
    """Likewise; where it is empty or null, nothing is validated."""
    prompt_template: str = key("{question}", evaluation=True)
    """The user's message; `{question}` stands for the row's question."""
    system_prompt: str | None = key(None, evaluation=True)
    """What the system says first, where a conversation brings none of its own."""
    max_prompt_tokens: int | None = key(None, evaluation=True)
    """Tokens of a prompt, at most; null is the room that rollout.max_new_tokens leaves."""
    overlong_prompts: OverlongPrompts = key(OverlongPrompts.drop, evaluation=True)
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
    verifier: str | None = key(None, replay=True, evaluation=True)
    """What calls an answer right: exact, math, regex, choice, or `pkg.module:function`; null where the task has no
    answers to check."""


@section
class RolloutConfig:
    prompts_per_step: int = 128
    generations_per_prompt: int = 1
    max_new_tokens: int = key(7168, replay=True, evaluation=True)
    """Tokens of an answer, at most."""
    max_sequence_length: int = key(8192, replay=True, evaluation=True)
    """Tokens of prompt and answer together, at most."""
    temperature: float = 1.0
    """Of sampling; 0 is greedy."""
    top_p: float = 1.0
    top_k: int = -1
    """Sample among the k most likely tokens; -1 is all of them."""
    stop: list[str] = key(factory=list, evaluation=True)
    """Strings that end an answer."""
    stop_token_ids: list[int] = key(factory=list, evaluation=True)
    """Tokens that end an answer, besides the model's own end-of-sequence tokens."""
    max_truncated_rate: float = key(0.9, resume=True, replay=True)
    """Share of answers that may reach their length limit, 0..1. Above it for three steps in a row the student may be
    losing its way of ending; 1 never minds."""
    on_truncation: OnTruncation = key(OnTruncation.warn, resume=True, replay=True)
    """What happens then: a warning, or a checkpoint and the end of the run."""
    on_policy_fraction: float = 1.0
    """Share of a step's sequences that the student writes, 0..1; the others are answers of `off_policy`, scored and
    trained on in the same way. 0 never asks the student: supervised or offline distillation; between, GKD's mixture."""
    off_policy: OffPolicy = OffPolicy.dataset
    """Whose answers those are: the dataset's (`response_key`), or the teacher's own, sampled as the student's are."""
    save_scores: bool = key(False, resume=True, replay=True)
    """Keep each step's sequences with the teacher's top-k in the run's `scores/`, for `distill replay`: about
    8 x (loss.topk + 2) bytes a response token."""
    replay: str | None = key(None, replay=True)
    """A run that kept its scores (`save_scores`): train on what it recorded, step by step, in place of new answers. No
    engine is started, unless something is validated. `distill replay RUN` sets it."""
    environment: str | None = key(None, evaluation=True)
    """What answers the student between its turns: calculator, guess, or `pkg.module:function`; null where a sequence is
    one answer."""
    max_turns: int = key(1, evaluation=True)
    """Turns of a sequence, at most, where there is an environment. rollout.max_new_tokens is of each,
    rollout.max_sequence_length of all of them with what the environment says."""


@section
class TrainConfig:
    max_steps: int = key(1000, resume=True)
    """Steps, each of `rollout.prompts_per_step` prompts."""
    max_epochs: int = key(10, resume=True)
    """Passes over the training prompts, at most; whichever of the two ends first."""
    global_batch_size: int = 64
    """Sequences to an optimizer step, over all ranks; it divides prompts_per_step x generations_per_prompt."""
    micro_batch_tokens: int = key(16384, resume=True)
    """Tokens of a forward and backward pass, at most: sequences are packed or padded up to it. Context-parallel ranks
    share them."""
    packing: bool = key(True, resume=True)
    """Sequences laid end to end, none seeing another; false pads those of similar length to the same length."""
    lr: float = 2e-5
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    warmup_updates: int = 10
    """Optimizer updates over which the learning rate rises from 0; a step has one for each global batch."""
    schedule: Schedule = Schedule.constant
    """After the warm-up: constant, or falling to 0 by the last optimizer step as a cosine or a line."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm where it is larger."""
    max_bad_updates: int = key(3, resume=True)
    """Optimizer updates in a row whose loss or gradient is not finite: each is skipped, and after that many the run
    stops and leaves the last one's rollouts in `rollouts/`."""
    precision: Precision = Precision.bf16
    """bf16: bfloat16 compute, float32 weights, reductions and loss. fp32: float32 throughout."""
    activation_checkpointing: Checkpointing = key(Checkpointing.full, resume=True)
    """What the backward pass computes again instead of keeping: each layer whole (full), all but matrix products and
    attention (selective), or nothing (none)."""
    cpu_offload: bool = key(False, resume=True)
    """Keep parameters, gradients and optimizer in host memory, on GPUs: slower, for what does not fit otherwise."""
    offload_optimizer: bool = key(False, resume=True)
    """Keep the optimizer's state in host memory, on GPUs, except inside the optimizer's step: room for the engines and
    the activations, for a copy there and back each step."""
    compile: bool = key(False, resume=True)
    """Compile each layer (torch.compile): a slower start, faster steps. Not with mesh.tensor above 1. Of compiled
    layers selective checkpointing keeps attention's output alone: matrix products are computed again."""
    seed: int = key(42, evaluation=True)
    """Of the order of prompts and of every sampled answer."""


@section
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


@section
class EngineModelConfig:
    tensor_parallel: int = key(1, evaluation=True)
    """Consecutive ranks that share one engine, for a model that is too large or too slow for one; it divides the ranks
    of a node, attention heads, the MLP and the vocabulary. Student, teacher and `mesh.tensor` may each have their
    own."""
    sleep: bool | None = None
    """Give the GPU's memory back while the others work: the student's weights are dropped, the teacher's go to host
    memory. null is true on GPUs; CPUs cannot."""
    gpu_memory_utilization: float = key(0.25, evaluation=True)
    """Share of a GPU's memory that the engine takes for weights and KV cache. Awake, each fits beside the trainer's
    part of the student; those that do not sleep, beside each other."""
    kv_cache_gib: float | None = key(None, evaluation=True)
    """Size of the KV cache; null on GPUs is what gpu_memory_utilization leaves, on CPUs 0.25 GiB."""
    max_model_len: int | None = None
    """Tokens of a sequence, at most; null is what training and validation need."""
    enforce_eager: bool = key(False, evaluation=True)
    """Leave out CUDA graphs and compilation: a faster start, slower sampling. CPUs always do."""
    kwargs: dict[str, Any] = key(factory=dict, evaluation=True)
    """Further arguments of `vllm.LLM`."""


@section
class EngineConfig:
    student: EngineModelConfig = field(default_factory=EngineModelConfig)
    teacher: EngineModelConfig = field(default_factory=EngineModelConfig)


@section
class EvalConfig:
    period: int = 20
    """Steps between validations; 0 is never."""
    at_start: bool = True
    at_end: bool = True
    teacher: bool = True
    """Measure the teacher once at the start: the share of the gap that was closed needs it."""
    max_samples: int = key(512, evaluation=True)
    """Validation prompts, at most; of several datasets, of each."""
    batch_size: int = key(64, evaluation=True)
    """Answers that each rank's engine is asked for at a time."""
    repeat: int = key(1, evaluation=True)
    """Answers to each prompt: accuracy is the mean over them, and `distill eval` adds pass@k and majority@k. More than
    one needs a temperature above 0."""
    temperature: float = key(0.0, evaluation=True)
    """0 is greedy."""
    top_p: float = key(1.0, evaluation=True)
    max_new_tokens: int | None = key(None, evaluation=True)
    """null is rollout.max_new_tokens."""
    record_samples: int = 16
    """Prompts (the first of validation, else of training) whose sampled answers are left in `rollouts/` at the start,
    every eval.period steps and at the end, with what both models say at each token: the report shows them. 0 is
    none."""


@section
class CheckpointConfig:
    enabled: bool = True
    period: int = 10
    """Steps between checkpoints. The last step has one too, and so has a run that is asked to stop."""
    keep_top_k: int = 3
    """How many are kept, the best by `metric`; the newest is kept besides. Those of steps without a value fill up."""
    metric: str = "val/accuracy"
    """Any train/, rollout/ or val/ metric (docs/metrics.md)."""
    higher_is_better: bool | None = None
    """Which values of `metric` are kept; null is what suits it: lower for a loss, higher for an accuracy."""
    must_save_by: str | None = None
    """DD:HH:MM:SS of wall clock since the command was typed, restarts included: before a step that may end later than
    that, the run saves a checkpoint and stops; `resume` goes on."""
    save_optimizer: bool = True
    """Without it a checkpoint is a third as large, and a resumed run is no longer exact."""
    async_save: bool = True
    """Train on while a checkpoint is written, at the cost of a copy in host memory."""

    @property
    def keeps_highest(self) -> bool:
        """Whether the best checkpoint is the one with the highest value of `metric`."""
        if self.higher_is_better is not None:
            return self.higher_is_better
        metric = find(self.metric)
        return metric is not None and metric.better == "higher"


@section
class SlurmConfig:
    partition: str | None = None
    """Where to queue; null is the cluster's default."""
    account: str | None = None
    """The account that is charged."""
    qos: str | None = None
    """Quality of service."""
    time: str | None = None
    """Time limit, such as 04:00:00, 2-12:00:00, or minutes; null is the partition's default."""
    cpus_per_node: int | None = None
    """CPUs of each node; null is a node's CPUs in the share of its GPUs that is used, or one a rank on CPUs."""
    mem: str | None = None
    """Memory of each node, such as 200G; 0 is all of it; null is the cluster's default."""
    constraint: str | None = None
    """Features that nodes must have."""
    exclude: str | None = None
    """Nodes to leave out."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell before the ranks start, such as `module load cuda`."""
    container: dict[str, Any] = field(default_factory=dict)
    """With pyxis: `image`, `mounts`, `workdir` and so on, each an argument --container-<name> of srun."""
    python: str | None = None
    """The interpreter on the nodes, or in the container; null is the one that submits."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Any other parameter of sbatch, without its dashes: {reservation: mine, exclusive: true}."""
    max_requeues: int = 10
    """How often a job starts again after a preemption, its time limit or the loss of a node."""
    signal_s: int = 120
    """Seconds before the time limit at which the run saves and is queued again; at least cluster.grace_s."""
    shared_folders: list[str] | None = None
    """Folders that every node sees, such as [/home, /scratch]; a run elsewhere is refused. null goes by the file
    system: a disk of this machine is refused if the nodes are other machines."""


@section
class ClusterConfig:
    """Where runs run. A launcher's own keys are in the section of its name: `cluster.slurm.*` has no effect with
    another launcher."""

    launcher: str = key("local", evaluation=True)
    """local (this machine) or slurm; `cluster=slurm` chooses it."""
    nodes: int = 1
    """Machines of a run; more than one needs a launcher that submits jobs."""
    gpus_per_node: int | None = key(None, evaluation=True)
    """null is what is visible, or what a node of the cluster has; 0 runs on CPUs."""
    ranks_per_node: int | None = key(None, evaluation=True)
    """Processes of a node; null is one a GPU, or one on CPUs. On GPUs it is the number of GPUs."""
    max_restarts: int = 3
    """How often a run that failed goes on by itself from its newest checkpoint. An attempt that ends with an error
    before its first step is not repeated."""
    hang_timeout_s: float = key(1800, evaluation=True)
    """Seconds that a stage of a step may take before the ranks are taken for hung and ended; 0 waits for ever."""
    grace_s: float = 60
    """Seconds that the ranks have for a checkpoint when the run is asked to stop (Ctrl-C, SIGTERM, a scheduler's
    warning)."""
    parallel_jobs: int | None = None
    """Runs of a sweep at a time; null is one on this machine, and as many as it gives on a cluster. On this machine's
    GPUs each run takes gpus_per_node of its own. A search draws as many trials at a time; null is one."""
    wait: bool = False
    """Follow a submitted job to its end and exit with its status; `--wait` is the same."""
    env: dict[str, str] = key(factory=dict, evaluation=True)
    """Environment variables of the ranks. Not for passwords and tokens: those are inherited from your shell."""
    hf_home: str | None = key(None, evaluation=True)
    """Folder of models and data from the Hugging Face hub; null is the environment's HF_HOME, or its default."""
    compile_cache: str | None = key(None, evaluation=True)
    """Folder of what torch, Triton and vLLM compile; null is each one's default. Best on a node's own disk."""
    tmp_dir: str | None = key(None, evaluation=True)
    """Folder of temporary files; null is the environment's TMPDIR. In all three, $NAMES are a node's own variables."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


@section
class MlflowConfig:
    enabled: bool = False
    """`tracker=mlflow`, which is the default, turns it on; `tracker=none` leaves all off."""
    uri: str | None = key(None, credentials="MLFLOW_TRACKING_URI")
    """Address of a tracking server or a database; null is MLFLOW_TRACKING_URI, or else `mlflow.db` in run.root.
    Credentials in it are not written down: they stay in the environment of what is started."""
    experiment: str = "distill"
    run_name: str | None = None
    """null is the run folder's name."""
    log_model: bool = False
    """Log the trained student's folder as the artifact `model` when the run has finished."""


@section
class TrackerConfig:
    """Where runs are shown besides their folders; several may be on. Each is a module of `track/`."""

    mlflow: MlflowConfig = field(default_factory=MlflowConfig)


@section
class SearchConfig:
    """A search (`distill -m` with a range or several values): each run draws its values from them."""

    trials: int | None = None
    """Number of runs; null runs every combination of the values instead. Typed on the command line."""
    sampler: SearchSampler = SearchSampler.tpe
    """tpe draws near the best trials so far, after ten random ones (Bergstra et al. 2011); random ignores them."""
    seed: int = 0
    """Seed of the sampler: the same command makes the same trials."""


@section
class RunConfig:
    root: str = "runs"
    """Where runs are kept."""
    name: str | None = None
    """The run's folder in root; null is <date>-<time>_<model>_<loss>."""
    print_every: int = key(1, resume=True)
    """Steps between printed lines where the output is no terminal."""


@section
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = key(factory=LossConfig, replay=True)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    train: TrainConfig = key(factory=TrainConfig, replay=True)
    mesh: MeshConfig = key(factory=MeshConfig, resume=True, replay=True)
    engine: EngineConfig = key(factory=EngineConfig, resume=True, replay=True)
    eval: EvalConfig = key(factory=EvalConfig, resume=True, replay=True)
    checkpoint: CheckpointConfig = key(factory=CheckpointConfig, resume=True, replay=True)
    cluster: ClusterConfig = key(factory=ClusterConfig, resume=True, replay=True)
    tracker: TrackerConfig = key(factory=TrackerConfig, resume=True, replay=True)
    search: SearchConfig = field(default_factory=SearchConfig)
    run: RunConfig = key(factory=RunConfig, replay=True)
