"""Conversation templates as Hugging Face's chat templates, for whoever serves a checkpoint: what
``processor.apply_chat_template`` renders is letter by letter the prompt that training and evaluation here write.

``content`` is a text with ``<image>`` markers, or a list of parts that are joined as the readers of data join them
(`llava_pdrop.data.entries`): every picture stands on a line of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError

from llava_pdrop.checkpoint.ends import ids_of, one_or_all
from llava_pdrop.data.conversation import TEMPLATES
from llava_pdrop.data.marks import end_ids, fitting, split_marks
from llava_pdrop.errors import UserError, check_name
from llava_pdrop.types import IMAGE_MARKER

PROBE = "which words are these"

JINJA = """\
{#- The conversation template NAME of llava_pdrop. -#}
{%- set state = namespace(system=SYSTEM, text='', picture=false, questions=0, asked=false, greeted=false) -%}
{%- for message in messages -%}
    {%- set state.text = '' -%}
    {%- set state.picture = false -%}
    {%- if message['content'] is string -%}
        {%- set state.text = message['content'] -%}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part is string or part['type'] == 'text' -%}
                {%- set words = part if part is string else part['text'] -%}
                {%- if state.picture and words and words[:1] != '\\n' -%}
                    {%- set state.text = state.text + '\\n' -%}
                {%- endif -%}
                {%- set state.text = state.text + words -%}
                {%- set state.picture = state.picture and not words -%}
            {%- elif part['type'] in ['image', 'image_url'] -%}
                {%- if state.text and state.text[-1:] != '\\n' -%}
                    {%- set state.text = state.text + '\\n' -%}
                {%- endif -%}
                {%- set state.text = state.text + MARKER -%}
                {%- set state.picture = true -%}
            {%- else -%}
                {{- raise_exception('a part of a message is a text or an image') -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- set pictures = state.text.split(MARKER) | length - 1 -%}
FRONT
    {%- if message['role'] == 'system' -%}
        {%- if not loop.first -%}
            {{- raise_exception('a system turn stands in front of all others') -}}
        {%- elif pictures -%}
            {{- raise_exception('show pictures in a question, not in the system turn') -}}
        {%- elif state.text -%}
            WITH_SYSTEM
        {%- endif -%}
    {%- elif message['role'] == 'user' -%}
        {%- if state.asked -%}
            {{- raise_exception('two questions in a row: questions and answers must alternate') -}}
        {%- endif -%}
ONE_PICTURE_QUESTION
        {{- (state.system + FIRST if not state.questions else BEFORE) + state.text + AFTER -}}
        {%- set state.questions = state.questions + 1 -%}
        {%- set state.asked = true -%}
    {%- elif message['role'] == 'assistant' -%}
        {%- if state.asked -%}
            {{- ANSWER -}}
        {%- elif state.questions or state.greeted or pictures -%}
            {{- raise_exception('an answer without a question: questions and answers must alternate') -}}
        {%- else -%}
            {%- set state.greeted = true -%}
        {%- endif -%}
        {%- set state.asked = false -%}
    {%- else -%}
        {{- raise_exception('a role is system, user or assistant, not ' + message['role']) -}}
    {%- endif -%}
{%- endfor -%}
{%- if not state.questions -%}
    {{- raise_exception('the conversation has no question') -}}
{%- endif -%}
{%- if add_generation_prompt and state.asked -%}
    {{- LEAD -}}
{%- endif -%}
"""
"""Words in capitals are put in by `jinja_of`. As in training, a greeting in front of the first question is left out."""

FRONT = """\
    {%- if pictures == 1 and message['role'] != 'system' -%}
        {%- set state.text = (MARKER + '\\n' + state.text.replace(MARKER, '').strip()).strip() -%}
    {%- endif -%}
"""
"""`conversation.image_to_front`."""

ONE_PICTURE_QUESTION = """\
        {%- if state.questions or not pictures -%}
            {{- raise_exception('this template takes one question, with an image') -}}
        {%- endif -%}
"""


def jinja_of(name: str) -> str:
    """The template ``name`` as a chat template for Hugging Face's sandbox.

    ``apply_chat_template(messages, add_generation_prompt=True)`` renders the text of `Template.generation_prompt`;
    without it, or behind a last answer, what was said so far. The beginning-of-sequence token is not in it: processors
    add it. What the template cannot write (a system turn, two questions in a row) raises an error there too.
    """
    template = TEMPLATES[name]
    shown = template.prompt_as or template
    own = None if shown.system_as is None else " + state.text + ".join(map(_quoted, shown.system_as.split("{}")))
    end = _quoted(shown.answer_lead + shown.end)
    empty = _quoted("") if shown.empty == "absent" else end
    answer = (
        f"{_quoted(shown.before_answer)} + (({_quoted(shown.answer_lead)} + state.text + {_quoted(shown.end)}) "
        f"if state.text else {empty}) + {_quoted(shown.after_answer)}"
    )
    refusal = f"{{{{- raise_exception({_quoted(f'the template {name} has no place for a system turn')}) -}}}}"
    first = shown.before_question if shown.before_first is None else shown.before_first
    blocks = {
        "FRONT": FRONT if template.image_first else "",
        "ONE_PICTURE_QUESTION": ONE_PICTURE_QUESTION if template.question_only_images else "",
    }
    values = {
        "NAME": name,
        "SYSTEM": _quoted(shown.system),
        "WITH_SYSTEM": f"{{%- set state.system = {own} -%}}" if own else refusal,
        "FIRST": _quoted(first),
        "BEFORE": _quoted(shown.before_question),
        "AFTER": _quoted(shown.after_question),
        "ANSWER": answer,
        "LEAD": _quoted(shown.before_answer),
        "MARKER": _quoted(IMAGE_MARKER),
    }
    # All values in one pass: one may hold such a word itself, as a system prompt may.
    return _filled(_filled(JINJA, blocks), values)


def _filled(text: str, values: Mapping[str, str]) -> str:
    return re.sub(rf"\b(?:{'|'.join(values)})\b", lambda found: values[found[0]], text)


def _quoted(text: str) -> str:
    """``text`` as a string of jinja."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


def shows_images(tokenizer: Any) -> bool:
    """Whether the chat template of ``tokenizer`` writes one image marker for a part of type ``image``, and the words of
    a part of type ``text``. One for texts alone writes the list as Python prints it, leaves it out, or fails."""
    parts = [{"type": "image"}, {"type": "text", "text": PROBE}]
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    except (TemplateError, ValueError, TypeError, KeyError, AttributeError):
        return False
    return text.count(IMAGE_MARKER) == 1 and text.count(PROBE) == 1 and "'type'" not in text


def give_chat(tokenizer: Any, generation: Any, asked: str | None, known: str | None = None, because: str = "") -> str:
    """Gives ``tokenizer`` the chat template that its checkpoint is to be served with, and puts the tokens that end an
    answer in it among those at which ``generate`` stops.

    Args:
        generation: the `GenerationConfig` of the checkpoint; changed in place.
        asked: name of the template that the user wants.
        known: name of the one that the checkpoint was trained with, as far as that is known, and ``because`` of what.
            It is used where the tokenizer's own chat template shows no images.

    Returns:
        a line for the user: which one was taken.

    Raises:
        UserError: there is no template ``asked``, or the tokenizer does not know its marks.
    """
    if asked is None and tokenizer.chat_template is not None and shows_images(tokenizer):
        return "chat template: the checkpoint's own"
    dropped = "" if tokenizer.chat_template is None else " (its own shows no images)"
    tokenizer.chat_template = None
    name = asked or known
    if name is None:
        return f"chat template: none{dropped}, as nothing says which it was trained with: choose one with --template"
    check_name("--template", name, TEMPLATES)
    split, _ = split_marks(TEMPLATES[name], tokenizer)
    if split and asked:
        able = ", ".join(fitting(tokenizer)) or "a plain one (qa)"
        raise UserError(f"--template {name}: {', '.join(split)} fall into several tokens of the tokenizer: take {able}")
    if split:
        marks = ", ".join(split)
        return f"chat template: none{dropped}, as the tokenizer does not know {marks} of {name}: choose with --template"
    tokenizer.chat_template = jinja_of(name)
    add_ends(generation, name, tokenizer)
    reason = "--template" if asked else because
    return f"chat template: {name}{dropped}" + (f", {reason}" if reason else "")


def add_ends(generation: Any, name: str, tokenizer: Any) -> None:
    """Puts the tokens that end an answer in the template ``name`` among those at which ``generate`` stops; the base may
    know others only."""
    ids = [*ids_of(generation.eos_token_id), *end_ids(TEMPLATES[name], tokenizer)]
    generation.eos_token_id = one_or_all(list(dict.fromkeys(ids)))
