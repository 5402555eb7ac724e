"""The page of ``llava-pdrop demo``. The one module that imports gradio, which needs an older pillow than all else may
have (see README.md beside this file). Nothing is fetched from outside, measured for others or shared, and nothing that
is sent is read before `Demo` and `guard` have looked at it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported; its check for newer versions goes too
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio as gr
from starlette.middleware import Middleware

from llava_pdrop.errors import UserError
from llava_pdrop.report.console import say
from llava_pdrop.serve.demo import MOST_CHARACTERS, Compared, Demo, pictures_of, table_of
from llava_pdrop.serve.guard import BodyLimit, attempted, clicked_token, padded, uploaded
from llava_pdrop.serve.server import bound

FONTS = ["ui-sans-serif", "system-ui", "sans-serif"]
"""Of the visitor's own system: a theme may else fetch some."""

MOST_DROPS = 6
WAITING = 32
"""Visitors that may wait for the model; the next one is told so."""

STYLE = """
.pictures { display: flex; flex-wrap: wrap; gap: 10px; }
.pictures figure { margin: 0; flex: 1 1 150px; max-width: 340px; }
.pictures img { width: 100%; }
.pictures figcaption { font-size: 13px; }
#figures td:nth-child(n+3), #figures th { white-space: nowrap; }
"""
INTRODUCTION = "One question, answered without and with dropping image tokens inside of the decoder."
STAGES = (
    "What is left of the picture as the model sees it (dark: dropped). Seconds are of one run each, vanilla first, and "
    "count from the question on: both read the picture."
)
CLICK = "Click on a token of an answer: which image tokens did the model look at when it wrote it?"
WEIGHTS = (
    "Attention of the position that wrote the token: mean over heads and over the layers named below a picture, where "
    "a token that is dropped, or has not entered yet, counts as 0; the brightest patch has the most. The percentage is "
    "what all image tokens have together, the rest is on text. Recorded in one forward over the finished answer."
)

BODY_BYTES = 2**20
"""Of a request that is no upload: a question and some numbers."""

AROUND = 2**20
"""Bytes of a request that uploads one picture, beside the picture's own."""


class Page(gr.Blocks):
    """Hands to its functions what a request has, as it is. Gradio would first fetch what a request names, copy files
    into its folder, and answer values of another type with a traceback that holds them whole."""

    async def preprocess_data(
        self, block_fn: Any, inputs: list[Any], state: Any, explicit_call: bool = False
    ) -> list[Any]:
        """The values for a function; what stands for a `gr.State` is the session's own, whatever was sent."""
        blocks = block_fn.inputs
        return [
            state[block._id] if block.stateful else value for block, value in zip(blocks, padded(inputs, len(blocks)))
        ]

    async def process_api(self, *given: Any, event_data: Any = None, **named: Any) -> dict[str, Any]:
        """As gradio does it; of an event only the clicked token is handed on."""
        event = gr.EventData(None, {"index": clicked_token(getattr(event_data, "_data", None))})
        return await super().process_api(*given, event_data=event, **named)


def page_of(demo: Demo, title: str) -> gr.Blocks:
    """The page about ``demo``, not yet served."""
    sliders = demo.sliders
    most = max(MOST_DROPS, len(sliders))
    with Page(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        found = gr.State(None, time_to_live=3600)
        gr.Markdown(f"## {title}\n{INTRODUCTION}")
        with gr.Row():
            with gr.Column():
                picture = gr.Image(label="Picture", sources=["upload", "clipboard"], elem_id="picture")
                question = gr.Textbox(label="Question", elem_id="question", max_length=MOST_CHARACTERS)
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Column():
                count = gr.Slider(0, most, len(sliders), step=1, label="Drops", elem_id="drops")
                rows = list[Any]()
                values = list[Any]()
                for drop in range(most):
                    layer, ratio = sliders[drop] if drop < len(sliders) else (demo.depth - 1, 0.0)
                    with gr.Row(visible=drop < len(sliders), elem_id=f"drop{drop}") as row:
                        values += [
                            gr.Slider(0, demo.depth - 1, layer, step=1, label="Before layer", elem_id=f"layer{drop}"),
                            gr.Slider(0, 1, ratio, step=0.001, label="share kept", elem_id=f"ratio{drop}"),
                        ]
                    rows.append(row)
        problem = gr.Textbox(label="Not answered", visible=False, interactive=False, elem_id="problem")
        figures = gr.HTML(elem_id="figures")
        gr.Markdown(STAGES)
        stages = gr.HTML(elem_id="stages")
        gr.Markdown(CLICK)
        with gr.Row():
            texts = [
                gr.HighlightedText(label=name, elem_id=id, combine_adjacent=False, show_inline_category=False)
                for name, id in (("Answer, vanilla", "vanilla"), ("Answer with dropping", "dropping"))
            ]
        clicked = gr.HTML(elem_id="attention")
        gr.Markdown(WEIGHTS)

        def visible(drops: Any) -> list[Any]:
            shown, _ = attempted(demo.count, drops, most)
            return [gr.update(visible=drop < (shown or 0)) for drop in range(most)]

        count.change(
            visible, count, rows, queue=False, api_visibility="private", show_progress="hidden",
        )  # fmt: skip
        one_at_a_time = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
        answered = [found, figures, *texts, stages, clicked]

        def answer(picture: Any, question: Any, drops: Any, *values: Any) -> list[Any]:
            file = uploaded(picture, gr.utils.get_upload_folder())
            shown = demo.compare(file, question, [*zip(values[::2], values[1::2])][: demo.count(drops, most)])
            pieces = [[(piece or "·", "token") for piece in side.pieces] for side in (shown.vanilla, shown.dropping)]
            note = gr.update(value=shown.note, visible=bool(shown.note))
            return [note, shown, table_of(shown), *pieces, pictures_of(demo.stages(shown)), None]

        gr.on(
            [ask.click, question.submit],
            _told(answer, len(answered)),
            [picture, question, count, *values],
            [problem, *answered],
            **one_at_a_time,
        )
        for text, dropping in zip(texts, (False, True)):
            text.select(_told(_attention(demo, dropping), 1), [found], [problem, clicked], **one_at_a_time)
    return page.queue(max_size=WAITING)


def _attention(demo: Demo, dropping: bool) -> Callable[..., list[Any]]:
    """What a click on a token of one of the two answers does."""

    def attention(found: Compared | None, event: gr.EventData) -> list[Any]:
        if found is None:
            raise UserError("the answer is not kept any longer: ask again")
        if event.index is None:
            raise UserError("no token of the answer is meant: click on one")
        return [gr.update(visible=False), pictures_of(demo.attention(found, dropping, event.index))]

    return attention


def _told(act: Callable[..., list[Any]], outputs: int) -> Callable[..., list[Any]]:
    """``act``, with what goes wrong as one line on the page, and nothing else changed there but ``outputs`` that are
    cleared."""

    @functools.wraps(act)  # gradio reads the signature
    def told(*given: Any) -> list[Any]:
        done, problem = attempted(act, *given)
        return [gr.update(value=problem, visible=True), *[None] * outputs] if done is None else done

    return told


def serve(demo: Demo, title: str, host: str, port: int) -> None:
    """Serves the page until Ctrl-C.

    Raises:
        UserError: the address cannot be had.
    """
    with bound(host, port) as free:  # before a model runs for nothing; gradio then binds by itself
        port = free.getsockname()[1]
    demo.warm()
    with TemporaryDirectory(prefix="llava-pdrop-demo-") as home:  # of this server alone: gradio's own is shared by all
        os.environ.setdefault("GRADIO_TEMP_DIR", home)
        _launch(demo, title, host, port)


def _launch(demo: Demo, title: str, host: str, port: int) -> None:
    page, limits = page_of(demo, title), demo.limits
    guard = Middleware(BodyLimit, BODY_BYTES, {"/upload": limits.picture_bytes + AROUND}, limits.body_seconds)
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            run_history=False,
            enable_monitoring=False,
            show_error=True,
            footer_links=[],
            max_file_size=limits.picture_bytes,
            app_kwargs={"middleware": [guard]},
            css=STYLE,
            theme=gr.themes.Default(font=FONTS, font_mono=["ui-monospace", "monospace"]),
            prevent_thread_lock=True,
        )
    except OSError:  # somebody else came in between, or listens there already
        raise UserError(f"--port {port}: is taken: name another one, or 0 for a free one") from None
    say(f"demo: {page.local_url} (Ctrl-C ends)")
    page.block_thread()
