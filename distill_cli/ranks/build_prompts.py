"""Builds what a rank asks from its config: the tokenizer, the training prompts in their order, the validation."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from distill_cli.config.derived import max_prompt_tokens, max_teacher_prompt_tokens, validates, validation_length
from distill_cli.config.schema import Config
from distill_cli.data.isolated import IsolatedEnvironments, IsolatedVerifier
from distill_cli.data.order import PromptOrder, PromptStream
from distill_cli.data.prompts import PromptMaker, PromptSettings, load_template, load_tokenizer, make_prompts
from distill_cli.data.recorded_run import Recording
from distill_cli.data.registry import load_examples
from distill_cli.data.rows import Stream
from distill_cli.engines.settings import SamplingSettings
from distill_cli.models.model_files import locate
from distill_cli.models.model_pair import OWN_TEMPLATE, EndTokens, read_template
from distill_cli.parallel.mesh import Parallel
from distill_cli.ranks.pair_facts import folders, one_class
from distill_cli.rollout.score_files import Replay
from distill_cli.rollout.turns import Turns, observation_encoder
from distill_cli.train.token_report import Watched
from distill_cli.train.validation import Validator, first_of_each

Order = PromptOrder | PromptStream | Replay
MAX_PROMPTS_AT_START = 50_000
"""Training prompts that are all made before the first step: about 15 s. More are made when their turn comes."""


def build_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    model = config.model
    if model.tokenizer is not None:
        folder = locate(model.tokenizer, key="model.tokenizer")
    else:
        folder = locate(model.student.path, revision=model.student.revision, key="model.student.path")
    return load_tokenizer(folder, chat_template=model.chat_template, trust_remote_code=model.trust_remote_code)


def build_order(config: Config, tokenizer: PreTrainedTokenizerBase, parallel: Parallel) -> Order:
    """The training prompts in their order: all made at the start, or one after the other where there are too many.

    In a replay what was recorded.
    """
    if config.rollout.replay is not None:
        return Replay(Recording.of(config.rollout.replay), topk=config.loss.topk, parallel=parallel)
    data, batch_size, seed = config.data, config.rollout.prompts_per_step, config.train.seed
    examples = load_examples(data.train, key="data.train", context=data.teacher_context)
    make = prompt_maker(config, tokenizer)
    if isinstance(examples, Stream) or len(examples) > MAX_PROMPTS_AT_START:
        return PromptStream(
            examples,
            make,
            batch_size=batch_size,
            seed=seed,
            shuffle=data.shuffle,
            buffer=data.shuffle_buffer,
            left_out=make.warnings,
        )
    prompts = make_prompts(examples, make, key="data.train")
    return PromptOrder(prompts, batch_size=batch_size, seed=seed, shuffle=data.shuffle)


def prompt_maker(config: Config, tokenizer: PreTrainedTokenizerBase) -> PromptMaker:
    environment = config.rollout.environment
    opening = IsolatedEnvironments(environment).make().reset if environment else None
    return PromptMaker(tokenizer, prompt_settings(config), opening=opening)


def prompt_settings(config: Config) -> PromptSettings:
    data, model = config.data, config.model
    return PromptSettings(
        max_tokens=max_prompt_tokens(config),
        prompt_template=data.prompt_template,
        system_prompt=data.system_prompt,
        template_kwargs=model.chat_template_kwargs,
        overlong=data.overlong_prompts.value,
        teacher_max_tokens=max_teacher_prompt_tokens(config),
        teacher_chat_template=teacher_chat_template(config),
        teacher_template_kwargs=model.teacher.chat_template_kwargs,
        has_teacher_context=data.teacher_context is not None,
        teacher_prompt_template=data.teacher_prompt_template,
    )


def teacher_chat_template(config: Config) -> str | None:
    """Return the text of the teacher's chat template; None is the student's."""
    teacher = config.model.teacher
    if teacher.chat_template == OWN_TEMPLATE:
        folder = locate(teacher.path, revision=teacher.revision, key="model.teacher.path")
        return load_template(folder, trust_remote_code=config.model.trust_remote_code)
    return None if teacher.chat_template is None else read_template(teacher.chat_template)


def build_validator(
    config: Config, parallel: Parallel, tokenizer: PreTrainedTokenizerBase, *, ends: tuple[int, ...] = ()
) -> Validator | None:
    """`ends` are tokens that end an answer besides the model's own and those of rollout.stop_token_ids."""
    settings = config.eval
    if not validates(config):
        return None
    examples = load_examples(config.data.validation, key="data.validation")
    most = settings.max_samples if isinstance(examples, Stream) else None
    prompts = make_prompts(examples, prompt_maker(config, tokenizer), key="data.validation", limit=most)
    return Validator(
        prompts=first_of_each(prompts, settings.max_samples),
        repeat=settings.repeat,
        sampling=SamplingSettings(
            max_new_tokens=settings.max_new_tokens or config.rollout.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            stop=tuple(config.rollout.stop),
            stop_token_ids=(*config.rollout.stop_token_ids, *ends),
            logp=False,
        ),
        verify=IsolatedVerifier(config.data.verifier),
        decode=make_decode(tokenizer),
        turns=build_turns(config, tokenizer, max_tokens=validation_length(config)),
        batch_size=settings.batch_size,
        seed=config.train.seed,
        parallel=parallel,
    )


def build_watched(
    config: Config, order: Order, validator: Validator | None, tokenizer: PreTrainedTokenizerBase
) -> Watched | None:
    """The first validation prompts; where nothing validates, the first of the training data."""
    num = config.eval.record_samples
    if num == 0 or (validator is None and isinstance(order, Replay)):
        return None
    return Watched(
        prompts=validator.prompts[:num] if validator is not None else order.first(num),
        token_text=lambda token: tokenizer.decode([token], skip_special_tokens=False),
    )


def build_turns(config: Config, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> Turns | None:
    if config.rollout.environment is None:
        return None
    ends = {tokenizer.eos_token_id, *config.rollout.stop_token_ids, *one_class(config)}
    if config.rollout.replay is None:
        of_models = EndTokens.of(*folders(config))
        ends |= of_models.student | of_models.teacher
    return Turns(
        make=IsolatedEnvironments(config.rollout.environment).make,
        max_turns=config.rollout.max_turns,
        max_tokens=max_tokens,
        decode=make_decode(tokenizer),
        observation_ids=observation_encoder(
            tokenizer,
            template_kwargs=config.model.chat_template_kwargs,
            end_ids=ends,
        ),
    )


def make_decode(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], str]:
    return lambda token_ids: tokenizer.decode(token_ids, skip_special_tokens=True)
