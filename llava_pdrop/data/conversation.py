"""Turns -> pieces of text that know whether they are trained on. A new chat format is one row in `TEMPLATES`.

Labels come from the pieces the text is put together from, never from tokenising parts of it again and counting: counts
go wrong wherever a tokeniser joins text across a border, and then whole conversations silently lose their labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from llava_pdrop.config.schema import Config
from llava_pdrop.errors import Unfit, check_name
from llava_pdrop.types import IMAGE_MARKER, Record, Turn


@dataclass(frozen=True)
class Piece:
    """A stretch of text; ``is_target`` if the model learns to write it."""

    text: str
    is_target: bool = False


class Round(NamedTuple):
    """A question and its answer, None where it has none. ``learnt``: whether the answer is trained on."""

    question: str
    answer: str | None
    learnt: bool = True


@dataclass(frozen=True)
class Template:
    """A chat format. A conversation is ``system`` and then, round by round,

        before_question + question + after_question + before_answer + [answer_lead + answer + end] + after_answer

    and what stands in brackets is trained on. The beginning-of-sequence token is the tokeniser's business.

    Attributes:
        system_as: how a record's own system prompt is written, at the place of ``{}``, instead of ``system``; None: the
            format has no place for one.
        before_first: stands in front of the first question instead of ``before_question``; None: the same.
        empty: what becomes of an empty answer. ``trained`` on like any other; ``masked``: written but not trained on,
            so that nobody learns to say nothing; ``absent``: nothing is written behind ``before_answer``, as LLaVA's
            v1, llama_2 and mpt do.
        question_only_images: training writes the images of the question and not its words (captioning, LLaVA stage 1);
            the conversation must then be one question with an image and one answer.
        image_first: a turn with one image shows it in front of its text (`image_to_front`).
        prompt_as: the format of prompts where LLaVA asks in another one than it trains in (v0, plain).
    """

    system: str = ""
    system_as: str | None = None
    before_question: str = ""
    before_first: str | None = None
    after_question: str = ""
    before_answer: str = ""
    answer_lead: str = ""
    end: str = ""
    after_answer: str = ""
    empty: Literal["trained", "masked", "absent"] = "masked"
    question_only_images: bool = False
    image_first: bool = False
    prompt_as: Template | None = None

    @property
    def stop(self) -> str:
        """What ends an answer in generation: ``end`` without the white space around it, or where it is nothing else, as
        it is."""
        return self.end.strip() or self.end

    def with_system(self, prompt: str | None) -> Template:
        """The format with a record's own system prompt instead of its own; None: as it is.

        Raises:
            Unfit: it has no place for one.
        """
        if prompt is None:
            return self
        if self.system_as is None:
            able = ", ".join(name for name, row in TEMPLATES.items() if row.system_as is not None)
            raise Unfit(
                "template",
                f"the conversation template has no place for its system prompt: remove that, or take one of {able} "
                "(model.template)",
            )
        own = None if self.prompt_as is None else self.prompt_as.with_system(prompt)
        return replace(self, system=self.system_as.replace("{}", prompt), prompt_as=own)

    def rounds(self, turns: Sequence[Turn]) -> list[Round]:
        """Questions with their answers; the answer of the last one is None if the conversation ends with a question.

        A greeting by the assistant before the first question is left out, as LLaVA does.

        Raises:
            Unfit: no question, a greeting that shows an image, two turns of one speaker in a row, or a
                conversation this template cannot write.
        """
        turns = list(turns)
        if turns and turns[0].role == "gpt":
            if IMAGE_MARKER in turns[0].text:
                raise Unfit(
                    "role_order", "the conversation starts with an answer that shows an image; start with a question"
                )
            turns = turns[1:]
        if not turns:
            raise Unfit("role_order", "the conversation has no question")
        for i, turn in enumerate(turns):
            if turn.role != ("human", "gpt")[i % 2]:
                raise Unfit(
                    "role_order",
                    f"two turns by '{turn.role}' in a row (turn {i}); questions and answers must alternate",
                )
        if self.question_only_images and (len(turns) > 2 or IMAGE_MARKER not in turns[0].text):
            raise Unfit("template", "a captioning template needs exactly one question with an image and its answer")
        texts = [image_to_front(turn.text) if self.image_first else turn.text for turn in turns]
        answered = [
            Round(question, answer, turn.learnt) for question, answer, turn in zip(texts[::2], texts[1::2], turns[1::2])
        ]
        return answered + [Round(question, None) for question in texts[2 * len(answered) :]]

    def pieces(self, rounds: Sequence[Round]) -> list[Piece]:
        """The text of whole rounds, for training.

        A last question without an answer is written, up to ``after_question``, and nothing of it is trained on.
        """
        return [piece for pieces in self.pieces_by_round(rounds) for piece in pieces]

    def pieces_by_round(self, rounds: Sequence[Round]) -> list[list[Piece]]:
        """`pieces`, those of every round by themselves; the first ones start with ``system``."""
        result = []
        for number, (question, answer, learnt) in enumerate(rounds):
            shown = IMAGE_MARKER * question.count(IMAGE_MARKER) if self.question_only_images else question
            pieces = [Piece(self.system)] if number == 0 else []
            before = self.before_question if number or self.before_first is None else self.before_first
            pieces.append(Piece(before + shown + self.after_question))
            if answer is not None:
                pieces.append(Piece(self.before_answer))
                if answer or self.empty != "absent":
                    trained = learnt and (answer != "" or self.empty == "trained")
                    pieces.append(Piece(self.answer_lead + answer + self.end, trained))
                pieces.append(Piece(self.after_answer))
            result.append([piece for piece in pieces if piece.text])
        return result

    def generation_prompt(self, rounds: Sequence[Round]) -> list[Piece]:
        """The text up to where the last round's answer starts; an answer given there (a reference) is not shown."""
        if self.prompt_as is not None:
            return self.prompt_as.generation_prompt(rounds)
        *before, last = rounds
        pieces = [*self.pieces([*before, Round(last.question, None)]), Piece(self.before_answer)]
        return [piece for piece in pieces if piece.text]


def image_to_front(text: str) -> str:
    """The image of a turn moved in front of its text, on a line of its own: what LLaVA does to its training data.

    A turn with several images is left as it is written, because there the places say which image is meant. (LLaVA
    merges them into one marker and loses all but the first image: golden/README 4.16.)
    """
    if text.count(IMAGE_MARKER) != 1:
        return text
    return f"{IMAGE_MARKER}\n{text.replace(IMAGE_MARKER, '').strip()}".strip()


# The system prompts and the example below are those the checkpoints were trained with, word for word
# (golden/README, text/prompts.json).
_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
_HUMAN = _USER.replace("user", "human").rstrip()
_LLAVA = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
_LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being "
    "safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal "
    "content. Please ensure that your responses are socially unbiased and positive in nature.\n"
    "\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering "
    "something not correct. If you don't know the answer to a question, please don't share false information."
)
_V0_EXAMPLE = (
    "###Human: What are the key differences between renewable and non-renewable energy sources?###Assistant: "
    "Renewable energy sources are those that can be replenished naturally in a relatively short amount of time, "
    "such as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other hand, are "
    "finite and will eventually be depleted, such as coal, oil, and natural gas. Here are some key differences "
    "between renewable and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources "
    "are finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than non-renewable "
    "sources, which can lead to air and water pollution, greenhouse gas emissions, and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have lower "
    "operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations "
    "than non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different situations "
    "and needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable "
    "sources are not, and their depletion can lead to economic and social instability.\n"
)

_V0 = Template(system_as="{}", before_question="###Human: ", before_answer="###Assistant:", answer_lead=" ")
_INST = Template(
    before_question="[INST] ",
    after_question=" [/INST]",
    answer_lead=" ",
    end=" </s>",
    empty="absent",
    image_first=True,
)
_CHATML = "<|im_start|>{}\n", "<|im_end|>"


def _llama_2(system: str) -> Template:
    opening = "[INST] <<SYS>>\n{}\n<</SYS>>\n\n"
    return replace(
        _INST,
        system=opening.replace("{}", system),
        system_as=opening,
        before_first="",
        before_question="<s>[INST] ",
    )


def _headed(
    head: str, end: str, system: str = "", between: str = "", empty: Literal["masked", "absent"] = "masked"
) -> Template:
    """A format in which every turn, the system prompt too, has a head that names its speaker, and the same end; what
    stands ``between`` two turns is not learnt."""
    system_as = head.format("system") + "{}" + end + between
    return Template(
        system=system_as.replace("{}", system) if system else "",
        system_as=system_as,
        before_question=head.format("user"),
        after_question=end + between,
        before_answer=head.format("assistant"),
        end=end,
        after_answer=between,
        empty=empty,
        image_first=True,
    )


TEMPLATES: dict[str, Template] = {
    # LLaVA stage 1: <image>caption\n
    "plain": Template(
        end="\n",
        empty="trained",
        question_only_images=True,
        image_first=True,
        prompt_as=Template(after_question="\n"),
    ),
    # The first LLaVA. It trains on "### Human: " lines and asks with "###Human: ", v0 even with an example in front
    "llava_v0": Template(
        system=f"{_HUMAN}\n\n### ",
        system_as="{}\n\n### ",
        before_question="Human: ",
        after_question="\n### ",
        before_answer="Assistant:",
        answer_lead=" ",
        end="\n###",
        after_answer=" ",
        image_first=True,
        prompt_as=replace(_V0, system=_HUMAN),
    ),
    # Vicuna 1.1, the format of LLaVA-1.5 and of LLaVA-NeXT on Vicuna
    "v1": Template(
        system=_USER,
        system_as="{} ",
        before_question="USER: ",
        after_question=" ",
        before_answer="ASSISTANT:",
        answer_lead=" ",
        end="</s>",
        empty="absent",
        image_first=True,
    ),
    "llama_2": _llama_2(_LLAMA_2),
    "llava_llama_2": _llama_2(_LLAVA),
    # LLaVA-NeXT on Mistral
    "mistral_instruct": _INST,
    # ChatML without line ends between the turns, as LLaVA on MPT and LLaVA-NeXT 34B write it
    "mpt": _headed(*_CHATML, _MPT, empty="absent"),
    "chatml_direct": _headed(*_CHATML, "Answer the questions.", empty="absent"),
    # LLaVA-NeXT on Qwen 2: ChatML as its makers write it
    "qwen_2": _headed(*_CHATML, "You are a helpful assistant.", between="\n"),
    # LLaVA-NeXT on Llama 3
    "llama_3": _headed("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>", _LLAVA),
    # Its assistant has another name, and it has no place for a system prompt
    "gemma": replace(
        _headed("<start_of_turn>{}\n", "<end_of_turn>", between="\n"),
        system_as=None,
        before_answer="<start_of_turn>model\n",
    ),
    # The embedded task: question, answer, end of line. No role names: every token more is one a miniature must learn
    "qa": Template(system_as="{}\n", answer_lead=" ", end="\n", empty="trained"),
}
TEMPLATES["v0"] = replace(
    TEMPLATES["llava_v0"], prompt_as=replace(_V0, system=_HUMAN + _V0_EXAMPLE, system_as="{}" + _V0_EXAMPLE)
)
TEMPLATES["llava_v1"] = replace(TEMPLATES["v1"], system=f"{_HUMAN} ")
TEMPLATES |= {  # the other names LLaVA has for them
    "v0_plain": TEMPLATES["plain"],
    "vicuna_v1": TEMPLATES["v1"],
    "mistral_direct": TEMPLATES["chatml_direct"],
    "chatml": TEMPLATES["mpt"],
}


def template_of(config: Config) -> Template:
    """The template that ``model.template`` names.

    Raises:
        ConfigError: there is none of that name.
    """
    check_name("model.template", config.model.template, TEMPLATES, config.file)
    return TEMPLATES[config.model.template]


def template_for(record: Record, template: Template) -> Template:
    """The template that a record is written in: the one that it names, else ``template``, that of the run.

    Raises:
        Problem: it names one that there is not.
    """
    if record.template is None:
        return template
    check_name("template", record.template, TEMPLATES)
    return TEMPLATES[record.template]
