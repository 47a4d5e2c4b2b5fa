"""Builds what a rank's engines are given, from its config: the tokenizer, prompts, turns and the validation."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from distill_cli.config.derived import max_prompt_tokens, max_teacher_prompt_tokens, validates, validation_length
from distill_cli.config.schema import Config
from distill_cli.data.isolated import IsolatedEnvironments, IsolatedVerifier
from distill_cli.data.prompts import PromptMaker, load_template, load_tokenizer, make_prompts
from distill_cli.data.registry import load_examples
from distill_cli.data.rows import Stream
from distill_cli.engines.settings import SamplingSettings
from distill_cli.models.model_files import locate
from distill_cli.models.model_pair import OWN_TEMPLATE, EndTokens, read_template
from distill_cli.parallel.mesh import Parallel
from distill_cli.ranks.pair_facts import folders, merged_eos_ids
from distill_cli.rollout.turns import Turns, observation_encoder
from distill_cli.train.validation import Validator, first_of_each


def build_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    model = config.model
    if model.tokenizer is not None:
        return load_tokenizer(locate(model.tokenizer, key="model.tokenizer"), model)
    return load_tokenizer(locate(model.student.path, revision=model.student.revision, key="model.student.path"), model)


def prompt_maker(config: Config, tokenizer: PreTrainedTokenizerBase) -> PromptMaker:
    teacher, template = config.model.teacher, config.model.teacher.chat_template
    environment = config.rollout.environment
    if template == OWN_TEMPLATE:
        folder = locate(teacher.path, revision=teacher.revision, key="model.teacher.path")
        template = load_template(folder, trust_remote_code=config.model.trust_remote_code)
    elif template is not None:
        template = read_template(template)
    return PromptMaker(
        tokenizer,
        data=config.data,
        model=config.model,
        max_tokens=max_prompt_tokens(config),
        teacher_max_tokens=max_teacher_prompt_tokens(config),
        teacher_template=template,
        opening=IsolatedEnvironments(environment).make().reset if environment else None,
    )


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


def build_turns(config: Config, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> Turns | None:
    if config.rollout.environment is None:
        return None
    ends = {tokenizer.eos_token_id, *config.rollout.stop_token_ids, *merged_eos_ids(config)}
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
