"""Builds what a rank asks from its config: the tokenizer, the training prompts in their order, the validation."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from distill_cli.config.derived import validates
from distill_cli.data.isolated import IsolatedEnvironments, IsolatedVerifier
from distill_cli.data.prompts import PromptMaker, PromptSettings, load_template, load_tokenizer, make_prompts
from distill_cli.data.registry import load_examples
from distill_cli.data.rows import Stream
from distill_cli.engines.settings import SamplingSettings
from distill_cli.models.model_pair import OWN_TEMPLATE, read_template
from distill_cli.parallel.mesh import Parallel
from distill_cli.resolved import ResolvedRun
from distill_cli.rollout.turns import Turns, observation_encoder
from distill_cli.train.validation import Validator, first_of_each


def build_tokenizer(found: ResolvedRun) -> PreTrainedTokenizerBase:
    model, folder = found.config.model, found.tokenizer.folder
    return load_tokenizer(folder, chat_template=model.chat_template, trust_remote_code=model.trust_remote_code)


def prompt_maker(found: ResolvedRun, tokenizer: PreTrainedTokenizerBase) -> PromptMaker:
    environment = found.config.rollout.environment
    opening = IsolatedEnvironments(environment).make().reset if environment else None
    return PromptMaker(tokenizer, prompt_settings(found), opening=opening)


def prompt_settings(found: ResolvedRun) -> PromptSettings:
    data, model = found.config.data, found.config.model
    return PromptSettings(
        max_tokens=found.lengths.prompt,
        prompt_template=data.prompt_template,
        system_prompt=data.system_prompt,
        template_kwargs=model.chat_template_kwargs,
        overlong=data.overlong_prompts.value,
        teacher_max_tokens=found.lengths.teacher_prompt,
        teacher_chat_template=teacher_chat_template(found),
        teacher_template_kwargs=model.teacher.chat_template_kwargs,
        has_teacher_context=data.teacher_context is not None,
        teacher_prompt_template=data.teacher_prompt_template,
    )


def teacher_chat_template(found: ResolvedRun) -> str | None:
    """Return the text of the teacher's chat template; None is the student's."""
    model = found.config.model
    if model.teacher.chat_template == OWN_TEMPLATE:
        return load_template(found.model("teacher").folder, trust_remote_code=model.trust_remote_code)
    return None if model.teacher.chat_template is None else read_template(model.teacher.chat_template)


def build_validator(found: ResolvedRun, parallel: Parallel, tokenizer: PreTrainedTokenizerBase) -> Validator | None:
    config, settings = found.config, found.config.eval
    if not validates(config):
        return None
    examples = load_examples(config.data.validation, key="data.validation")
    most = settings.max_samples if isinstance(examples, Stream) else None
    prompts = make_prompts(examples, prompt_maker(found, tokenizer), key="data.validation", limit=most)
    return Validator(
        prompts=first_of_each(prompts, settings.max_samples),
        repeat=settings.repeat,
        sampling=SamplingSettings(
            max_new_tokens=settings.max_new_tokens or config.rollout.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            stop=tuple(config.rollout.stop),
            stop_token_ids=(*config.rollout.stop_token_ids, *found.vocabulary.merged_eos_ids),
            logp=False,
        ),
        verify=IsolatedVerifier(config.data.verifier),
        decode=make_decode(tokenizer),
        turns=build_turns(found, tokenizer, max_tokens=found.lengths.validation),
        batch_size=settings.batch_size,
        seed=config.train.seed,
        parallel=parallel,
    )


def build_turns(found: ResolvedRun, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> Turns | None:
    config, of_models = found.config, [model.eos_ids for model in (found.student, found.teacher) if model is not None]
    if config.rollout.environment is None:
        return None
    ends = {tokenizer.eos_token_id, *config.rollout.stop_token_ids, *found.vocabulary.merged_eos_ids}
    if config.rollout.replay is None:
        ends |= {token for ids in of_models for token in ids}
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
