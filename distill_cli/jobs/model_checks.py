"""Checks of the models: names, vocabularies, end tokens, lengths, layouts, recordings. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING

from distill_cli.config.derived import needed_length, scored_length, validation_length
from distill_cli.config.schema import Config, EosMap
from distill_cli.config.teachers import ONLY, model_key, own_temperatures, path_key, teacher_configs
from distill_cli.config.variation import forbidden_changes, load_config, override
from distill_cli.data.recorded_run import Recording, vocabulary_digest
from distill_cli.data.registry import resolve_environment, resolve_verifier
from distill_cli.engines.process_setup import hide_broken_packages
from distill_cli.errors import ConfigError, broken, collect
from distill_cli.jobs import other_tokens
from distill_cli.jobs.other_tokens import OtherTokens
from distill_cli.jobs.template_checks import sample_messages
from distill_cli.models import known_families, lora_names, model_files, model_pair, tensor_plan, tried_families
from distill_cli.models.model_files import ModelFiles
from distill_cli.models.model_pair import Vocabularies
from distill_cli.models.tensor_names import EMBEDDING, HEAD, LAYER
from distill_cli.models.traits import Traits
from distill_cli.resolved import SharedVocabulary

if TYPE_CHECKING:
    from distill_cli.jobs.preflight import Facts

OTHER_TASKS = re.compile(r"MaskedLM|Classification|QuestionAnswering|MultipleChoice|RewardModel|PreTraining$")
"""Architectures whose checkpoints have no head over the vocabulary, or one that does not predict the next token."""
DEQUANTIZED = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}
"""Method -> the class of transformers that makes a plain copy with `dequantize=True`."""


def weights(facts: Facts) -> None:
    """The files of both models' weights must be whole. Raises ConfigError with those that are not."""
    collect(partial(model_files.tensors, files.folder) for files in facts.models().values())


def causal(facts: Facts, config: Config) -> Iterator[str]:
    """Student and teacher must be decoders that predict the next token."""
    for key, files in facts.models().items():
        if problem := _causal_problem(files):
            yield f"{key}={files.path}: {problem}; give a causal LM"


def _causal_problem(files: ModelFiles) -> str | None:
    """Return why a model does not predict next tokens; None if it may."""
    config, traits = model_files.read_config(files.folder), Traits.read(files.folder)
    text = model_files.text_config(config)
    if traits.is_encoder_decoder:
        return f"{traits.family} is an encoder-decoder"
    for name in config.get("architectures") or ():
        if OTHER_TASKS.search(name):
            return f"{name} does not predict the next token"
    if traits.family in known_families.encoder_families() and not text.get("is_decoder"):
        return f"{traits.family} is an encoder, which sees the tokens that it is to predict"
    for name, value in (("use_bidirectional_attention", True), ("is_causal", False)):
        if text.get(name) is value:
            return f"{name}={str(value).lower()} in config.json: its tokens see later ones"
    if config.get("tie_word_embeddings") is False and not traits.is_multimodal:  # those say it twice
        names = model_files.tensors(files.folder)
        if any(EMBEDDING.search(name) for name in names) and not any(HEAD.search(name) for name in names):
            return "it has no head over its vocabulary"
    return None


def sizes(facts: Facts) -> Iterator[str]:
    """Tensors must have the sizes that config.json says."""
    for key, files in facts.models().items():
        if problem := _size_problem(files):
            yield f"{key}={files.path}: {problem}; correct config.json, or download the model again"


def _size_problem(files: ModelFiles) -> str | None:
    shapes = model_files.text_shapes(files.folder)
    text, traits = model_files.text_config(model_files.read_config(files.folder)), Traits.read(files.folder)
    rows = {shape[0] for name, shape in shapes.items() if EMBEDDING.search(name) and len(shape) == 2}
    if len(rows) == 1 and (found := rows.pop()) != files.vocab_size and traits.quantization is None:
        return f"config.json says vocab_size={files.vocab_size}, and the embedding has {found} rows"
    hidden = text.get("hidden_size")
    if hidden and shapes and traits.quantization is None and not any(hidden in shape for shape in shapes.values()):
        return f"config.json says hidden_size={hidden}, and no tensor has that size"
    layers = {int(match[1]) for name in shapes if (match := LAYER.search(name))}
    if layers and traits.num_layers and traits.num_layers > len(layers):
        return f"config.json says {traits.num_layers} layers, and the files have {len(layers)}"
    return None


def trainable(config: Config, student: ModelFiles) -> Iterator[str]:
    """The student must be a causal LM of transformers, or of its own code, with plain weights."""
    traits, path = Traits.read(student.folder), f"model.student.path={student.path}"
    if problem := _class_problem(config, student, traits):
        yield f"{path}: {problem}"
    if traits.chooses_keys:
        yield f"{path}: an indexer chooses the keys that its attention sees, which is not trained here; give another"
    if why := tried_families.failure(traits.family or "", "one rank"):
        yield f"{path}: students of {traits.family} were tried: {why}; give another"
    quantized = {dtype for dtype, _ in _matrices(student).values()} - model_files.PLAIN_DTYPES
    method = traits.quantization or ", ".join(sorted(quantized))
    if method:
        fix = "give a dequantized copy in bfloat16"
        if method in DEQUANTIZED:
            fix += (
                f": load it in transformers with quantization_config={DEQUANTIZED[method]}(dequantize=True) and save it"
            )
        yield f"{path}: its weights are quantized ({method}) and cannot be trained; {fix}"


def _class_problem(config: Config, student: ModelFiles, traits: Traits) -> str | None:
    """Return why no class with a head can be built from the student's config.json; None if one can."""
    content, family = model_files.read_config(student.folder), traits.family
    families, causal_families = known_families.families(), known_families.causal_families()
    own_code = "AutoModelForCausalLM" in (content.get("auto_map") or {})
    published = next(iter(content.get("architectures") or ()), None)
    if traits.is_encoder_decoder or (own_code and config.model.trust_remote_code):
        return None  # `causal` reports the first
    if family is None:
        return "config.json has no model_type; give a model of transformers"
    if not causal_families:
        return None  # transformers' source is laid out in another way
    has_head = published in known_families.head_classes()
    code = known_families.source_of(family, "modeling") if has_head and family in families else ""
    if code and not re.search(rf"^class {published}\b", code, re.MULTILINE):
        return f"config.json names {published}, which is no class of its model_type {family}; correct it"
    if family in causal_families or (family in families and has_head):
        return None
    if own_code:
        return f"model_type {family} is code in its folder; set model.trust_remote_code=true to run it"
    transformers = f"transformers {known_families.transformers_version()}"
    if family not in families:
        return f"{transformers} has no model_type {family}; give another student, or update transformers"
    return f"{transformers} has no causal LM of model_type {family}; give another student"


def _matrices(files: ModelFiles) -> dict[str, tuple[str, tuple[int, ...]]]:
    tensors = model_files.tensors(files.folder)
    return {name: entry for name, entry in tensors.items() if len(entry[1]) > 1 and name.endswith("weight")}


def layout(facts: Facts, config: Config, student: ModelFiles) -> Iterator[str]:
    """Give each document a row of its own if the student's layers would mix those of a packed row."""
    reasons = ", ".join(Traits.read(student.folder).needs_rows)
    if not reasons:
        return
    facts.config = override(config, {"train.packing": False})
    if (size := config.mesh.context) > 1:
        yield f"mesh.context={size}: ranks cannot share sequences of this student ({reasons}); set it to 1"


def names(config: Config) -> None:
    """Verifier and environment must exist. Raises ConfigError."""
    if config.data.verifier is not None:
        resolve_verifier(config.data.verifier)
    if config.rollout.environment is not None:
        resolve_environment(config.rollout.environment)


def pair(
    facts: Facts, config: Config, student: ModelFiles, teachers: dict[str, ModelFiles], tokenizer: ModelFiles
) -> Iterator[str]:
    """Student and teachers must share a vocabulary; warn of other differences between them."""
    if config.model.tokenizer and (other := Vocabularies.of(tokenizer.folder, student.folder).problem()):
        yield f"model.tokenizer={config.model.tokenizer}: not the student's vocabulary: {other}; leave it out"
    alone = teacher_configs(config)
    own = {name: files for name, files in teachers.items() if alone[name].model.teacher.has_own_tokenizer}
    pairs = {
        name: Vocabularies.of(student.folder, files.folder, tokenizer=tokenizer.folder)
        for name, files in teachers.items()
        if name not in own
    }
    sample = facts.data.sample if facts.data else None
    others = collect(partial(other_tokens.compare, student, files, tokenizer, sample) for files in own.values())
    facts.other_tokens = dict(zip(own, others, strict=True))
    same = [files for name, files in teachers.items() if name not in own]
    vocabulary = shared_vocabulary(config, list(pairs.values()), student, same, list(others))
    facts.vocabulary = facts.vocabulary or vocabulary  # a recording's goes first
    for name, files in own.items():
        facts.warnings += _own_warnings(alone[name], f"{path_key(name)}={files.path}", files, facts.other_tokens[name])
        if config.loss.topk > files.vocab_size:
            yield f"loss.topk={config.loss.topk}: must be at most the {files.vocab_size} tokens of {path_key(name)}"
    for name, both in pairs.items():
        if problem := both.problem():
            what = f"its vocabulary is not the student's ({config.model.student.path}): {problem}"
            fix = f"set {model_key(name)}.tokenizer=own, or choose a pair with the same tokenizer"
            yield f"{path_key(name)}={teachers[name].path}: {what}; {fix}"
    if config.loss.topk > vocabulary.size:
        yield f"loss.topk={config.loss.topk}: must be at most the vocabulary of {vocabulary.size}"
    yield from _too_long(config, "the student", student, needed_length(config))
    for name, files in teachers.items():
        if name not in own:
            yield from _too_long(alone[name], _shown(name), files, scored_length(alone[name]))
    for name, both in pairs.items():
        prefix = "" if len(pairs) == 1 else f"{model_key(name)}: "
        warnings = _pair_warnings(facts, alone[name], both, student, teachers[name], tokenizer)
        facts.warnings += [f"{prefix}{warning}" for warning in warnings]


def _shown(name: str) -> str:
    return "the teacher" if name == ONLY else f"the teacher {name}"


def _too_long(config: Config, who: str, model: ModelFiles, length: int) -> Iterator[str]:
    """Yield a problem if sequences of `length` tokens have more positions than the model."""
    keys = ("rollout.max_sequence_length", "eval.max_new_tokens", "data.max_teacher_prompt_tokens")
    given = {key: value for key in keys if (value := attrgetter(key)(config)) is not None}
    what = ", ".join(f"{key}={value}" for key, value in given.items())
    if length > (most := model.max_positions or math.inf):
        yield f"{what}: sequences of up to {length} tokens, and {who} has {most} positions; lower the largest"


def _own_warnings(config: Config, shown: str, teacher: ModelFiles, found: OtherTokens) -> Iterator[str]:
    """Yield what to know of a run's only teacher, which has a tokenizer of its own."""
    if found.aligned < other_tokens.LITTLE:
        what = f"{shown}: of a sample only {found.aligned:.0%} of the student's tokens begin where its own do"
        yield f"{what}; at the others it says what follows inside a token"
    limit = min(config.engine.teacher.max_model_len or math.inf, teacher.max_positions or math.inf)
    if limit < (needed := needed_length(config)):
        what = f"{shown}: reads {limit} tokens, and the student's sequences have up to {needed}"
        yield f"{what}: what is beyond has no loss"
    if not config.model.teacher.chat_template and model_pair.chat_template(teacher.folder) is None:
        yield f"{shown}: has no chat template: it reads the plain text of prompts"


def _pair_warnings(
    facts: Facts,
    config: Config,
    both: Vocabularies,
    student: ModelFiles,
    teacher: ModelFiles,
    tokenizer: ModelFiles,
) -> Iterator[str]:
    sample = facts.data.sample if facts.data else None
    for folder in {tokenizer.folder, teacher.folder}:
        if model_files.vocabulary(folder) is None:
            yield f"{folder} has no tokenizer.json: cannot check whether its vocabulary fits the other's"
    if warning := both.warning():
        yield warning
    if student.eos_ids != teacher.eos_ids:
        off = "with model.eos_map=off the student may learn not to stop; choose auto"
        auto = "model.eos_map=auto: sampling stops at any of them, and the loss compares the probability of ending"
        ends = f"the student ends with tokens {list(student.eos_ids)} and the teacher with {list(teacher.eos_ids)}"
        yield f"{ends}; {auto if config.model.eos_map is EosMap.auto else off}"
    if sample is not None and config.model.teacher.chat_template is config.model.chat_template is None:
        messages, folders = sample_messages(config, sample), (tokenizer.folder, teacher.folder)
        if text := model_pair.template_difference(*folders, messages, **config.model.chat_template_kwargs):
            fix = "both read the student's unless model.teacher.chat_template=own"
            yield f"student and teacher have different chat templates, {text}; {fix}"


def shared_vocabulary(
    config: Config,
    pairs: Sequence[Vocabularies],
    student: ModelFiles,
    teachers: Sequence[ModelFiles],
    others: Sequence[OtherTokens] = (),
) -> SharedVocabulary:
    """Return the ids that all models have, and the end-of-sequence tokens that the loss merges, the student's first.

    The merged tokens end an answer, and the loss compares the probability of any of them; none if the models agree.

    Args:
        pairs: the student with each of the teachers.
        others: the teachers with tokenizers of their own.
    """
    limit = min((both.limit for both in pairs if both.limit is not None), default=None)
    merged: tuple[int, ...] = ()
    ends = [*(teacher.eos_ids for teacher in teachers), *(other.end_ids for other in others)]
    if config.model.eos_map is not EosMap.off and any({*own} != {*student.eos_ids} for own in ends):
        theirs = {token for own in ends for token in own}
        merged = (*student.eos_ids, *sorted(theirs - {*student.eos_ids}))
    below = tuple(token for token in merged if limit is None or token < limit)
    size = min((size for both in pairs for size in both.sizes), default=student.vocab_size)
    return SharedVocabulary(limit or size, limit, below if len(below) > 1 else ())


def positions(config: Config, student: ModelFiles) -> Iterator[str]:
    """Prompt and answer of an evaluation must fit the model."""
    length, fix = validation_length(config), "lower eval.max_new_tokens, or data.max_prompt_tokens"
    if length > (most := student.max_positions or math.inf):
        yield f"{student.path}: has {most} positions, and prompt and answer may take {length}; {fix}"


def rotary(config: Config, student: ModelFiles) -> Iterator[str]:
    """Sequences must be of the lengths for which trainer and sampler rotate alike."""
    text = model_files.text_config(model_files.read_config(student.folder))
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else None
    limit = (
        text.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") if kind else None
    )
    if kind == "longrope" and isinstance(limit, int) and (length := needed_length(config)) > limit:
        why = f"beyond {limit} tokens the student's frequencies are others in transformers than in vLLM (longrope)"
        yield f"rollout.max_sequence_length, eval.max_new_tokens: sequences of up to {length} tokens: {why}; lower them"


def router(config: Config, student: ModelFiles) -> Iterator[str]:
    """The family of the student must have the loss that balances its experts."""
    weight, traits = config.train.router_aux_loss, Traits.read(student.folder)
    if weight and (traits.experts is None or not traits.has_router_loss):
        yield f"train.router_aux_loss={weight}: {traits.family} has no auxiliary loss for a router; set it to 0"


def tensor_parallel(config: Config, student: ModelFiles) -> None:
    """The student must divide over mesh.tensor ranks. Raises ConfigError."""
    size, traits = config.mesh.tensor, Traits.read(student.folder)
    if size <= 1 or _class_problem(config, student, traits) or _causal_problem(student):
        return
    if traits.uncut:
        what = f"{traits.family} has {', '.join(traits.uncut)}, which are not cut"
        raise ConfigError(f"mesh.tensor={size}: {what}; set it to 1")
    text = {"model_type": traits.family, **model_files.text_config(model_files.read_config(student.folder))}
    declared = tensor_plan.declared_plan(text["model_type"]) or _imported_plan(config, student)
    tensor_plan.matrix_plan(text, declared)
    tensor_plan.check_sizes(text, size)


def _imported_plan(config: Config, student: ModelFiles) -> dict[str, str] | None:
    """Return the plan of a family whose config class makes it. Imports transformers and torch. Raises ConfigError."""
    hide_broken_packages()
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.utils.logging import set_verbosity_error

    set_verbosity_error()  # problems are reported below, in one line
    trusted = config.model.trust_remote_code
    try:
        model = AutoConfig.from_pretrained(student.folder, trust_remote_code=trusted).get_text_config()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        why = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{student.folder}: transformers does not take its config.json ({why}); correct it"
        ) from error
    return getattr(model, "base_model_tp_plan", None)


def tried_layouts(config: Config, student: ModelFiles) -> Iterator[str]:
    """No axis of the mesh may be one over which students of this family were tried, and failed."""
    family = Traits.read(student.folder).family or ""
    for axis in tried_families.AXES:
        size = getattr(config.mesh, axis)
        if size > 1 and (why := tried_families.failure(family, axis)):
            yield f"mesh.{axis}={size}: students of {family} were tried: {why}; set it to 1"


def expert_parallel(config: Config, student: ModelFiles) -> Iterator[str]:
    """The student's experts must divide over mesh.expert ranks."""
    size, traits = config.mesh.expert, Traits.read(student.folder)
    if size > 1 and traits.experts is None:
        yield f"mesh.expert={size}: the student ({traits.family}) has no experts; set it to 1"
    elif size > 1 and traits.experts and traits.experts.number % size:
        fits = ", ".join(str(n) for n in range(1, traits.experts.number + 1) if traits.experts.number % n == 0)
        yield f"mesh.expert={size}: does not divide the {traits.experts.number} experts; choose one of {fits}"


def adapters(config: Config, student: ModelFiles) -> Iterator[str]:
    """The student must have the layers that adapters are trained for. Raises ConfigError."""
    rank, targets = config.model.student.lora.rank, config.model.student.lora.targets
    if rank:
        layers = lora_names.targeted(model_files.shapes(student.folder), targets)
        if rank > (most := max(min(shape) for shape in layers.values())):
            yield f"model.student.lora.rank={rank}: no matrix that it is for has a rank above {most}; lower it"


def recorded(recording: Recording, config: Config, student: ModelFiles, tokenizer: ModelFiles) -> Iterator[str]:
    """Yield each reason why the config cannot train on what another run recorded."""
    before, facts = load_config(recording.folder.parent / "config.yaml"), recording.facts
    for name, old, new in forbidden_changes(before, config, unless="replay"):
        yield f"{name}={new}: the rollouts were recorded with {old}; leave it out, or start a new run"
    rollout, loss, scores = config.rollout, config.loss, f"was recorded with {facts.temperature}, as its scores are"
    answer, sequence = recording.longest_response, recording.longest_sequence
    if rollout.longest_answer < answer and rollout.max_turns == 1:
        longest = f"the longest recorded answer has {answer} tokens"
        yield f"rollout.max_new_tokens={rollout.longest_answer}: {longest}; raise it"
    longest = f"the longest recorded sequence has {sequence} tokens"
    if rollout.max_sequence_length < sequence:
        yield f"rollout.max_sequence_length={rollout.max_sequence_length}: {longest}; raise it"
    old, new = teacher_configs(before), teacher_configs(config)
    for name in old.keys() & new.keys():
        kinds = [one[name].loss.alignment for one in (old, new)]
        if old[name].model.teacher.has_own_tokenizer and kinds[0] is not kinds[1]:
            was = f"the tokens of {model_key(name)} were aligned by {kinds[0].value} when they were recorded"
            yield f"loss.alignment={kinds[1].value}: {was}; leave it out"
    topk, positions = f"{facts.topk} tokens of the teacher were recorded", student.max_positions or math.inf
    key, path = f"model.student.path={student.path}", before.model.student.path
    is_topk = not facts.hidden
    if (own := own_temperatures(config)) != facts.temperatures and loss.temperature == facts.temperature and is_topk:
        yield f"model.teachers: temperatures of their own are {own}, and {facts.temperatures} were recorded; drop them"
    yield from broken(
        (
            is_topk and loss.temperature != facts.temperature,
            f"loss.temperature={loss.temperature}: the teacher {scores}; drop it",
        ),
        (is_topk and loss.topk > facts.topk, f"loss.topk={loss.topk}: {topk}; lower it"),
        (
            is_topk and loss.needs_hidden,
            f"loss.support={loss.support.value}: the run recorded the teacher's top-k alone; record with "
            "rollout.save_scores=hidden",
        ),
        (loss.topk > facts.vocab_size, f"loss.topk={loss.topk}: the vocabulary has {facts.vocab_size} ids; lower it"),
        (positions < sequence, f"{key}: has {positions} positions, and {longest}; give another student"),
    )
    digest = vocabulary_digest(tokenizer.folder, facts.vocab_size)
    if student.vocab_size < facts.vocab_size:
        yield f"{key}: its vocabulary has {student.vocab_size} ids, and {facts.vocab_size} were recorded with {path}"
    elif set(facts.end_tokens) != set(student.eos_ids):
        ends = f"ends with tokens {list(student.eos_ids)}, and {path}, which was recorded, with {facts.end_tokens}"
        yield f"{key}: {ends}; give a student with the same"
    elif None not in (digest, facts.vocabulary) and digest != facts.vocabulary:
        yield f"{key}: its tokens are not those that were recorded with {path}; give a student with the same"
